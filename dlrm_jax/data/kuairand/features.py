"""The features of KuaiRand: which columns there are, and impressions joined with their user and video."""

from pathlib import Path
from typing import Literal

import polars as pl

from dlrm_jax.data.kuairand.csv_rows import read_csv_blocks
from dlrm_jax.data.rejects import Rejects

FeatureSet = Literal["plain", "full"]
USER_FILE = "user_features_pure.csv"
VIDEO_FILE = "video_features_basic_pure.csv"

_USER_CATEGORIES = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
_VIDEO_CATEGORIES = ("video_type", "upload_type", "music_type", "music_id", "server_width", "server_height")
_USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_VIDEO_NUMBERS = ("video_duration", "server_width", "server_height")

SINGLE_FEATURES = (
    *("user_id", "video_id", "author_id", "tab", "hour", "weekday"),
    *_USER_CATEGORIES,
    *_VIDEO_CATEGORIES,
)
# Bags, each with the feature whose vocabulary it shares (its own, for tags).
PLAIN_BAGS = {"tag": "tag"}
HISTORY_BAGS = {
    "recent_clicked_videos": "video_id",
    "recent_clicked_authors": "author_id",
    "recent_clicked_tags": "tag",
    "recent_skipped_videos": "video_id",
}
PLAIN_DENSE = (*(f"log_{name}" for name in (*_USER_NUMBERS, *_VIDEO_NUMBERS)), "video_age_days")

_MS_PER_HOUR = 3_600_000
_CHINA_MS = 8 * _MS_PER_HOUR


def read_users(source: Path, rejects: Rejects) -> pl.DataFrame:
    """Reads the users' features, one row for each; held in memory."""
    columns: dict[str, type[pl.DataType]] = {"user_id": pl.Int64}
    columns |= dict.fromkeys(_USER_CATEGORIES, pl.String) | dict.fromkeys(_USER_NUMBERS, pl.Float64)
    return _read_table(source / USER_FILE, columns, "user_id", rejects)


def read_videos(source: Path, rejects: Rejects) -> pl.DataFrame:
    """Reads the videos' features, one row for each; held in memory."""
    columns: dict[str, type[pl.DataType]] = {"video_id": pl.Int64, "author_id": pl.Int64}
    columns |= {"tag": pl.String, "upload_dt": pl.String}
    columns |= dict.fromkeys(_VIDEO_CATEGORIES, pl.String) | {"video_duration": pl.Float64}
    numbers = [
        pl.col(name).cast(pl.Float64, strict=False).alias(f"{name}_number")
        for name in ("server_width", "server_height")
    ]
    return _read_table(source / VIDEO_FILE, columns, "video_id", rejects).with_columns(numbers)


def join_features(impressions: pl.DataFrame, users: pl.DataFrame, videos: pl.DataFrame) -> pl.DataFrame:
    """Adds the plain features to impressions: categories as strings, lists of tags, and dense features.

    An impression of a user or video that has no features keeps them null (0 in dense features).
    """
    rows = impressions.join(users, on="user_id", how="left", maintain_order="left")
    rows = rows.join(videos, on="video_id", how="left", maintain_order="left")
    local_time = pl.col("time_ms") + _CHINA_MS
    local_day = local_time // (24 * _MS_PER_HOUR)
    uploaded = pl.col("upload_dt").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64)
    numbers = {name: name for name in (*_USER_NUMBERS, "video_duration")}
    numbers |= {name: f"{name}_number" for name in ("server_width", "server_height")}
    rows = rows.with_columns(
        (local_time // _MS_PER_HOUR % 24).alias("hour"),
        ((local_day + 3) % 7).alias("weekday"),  # 1 January 1970 was a Thursday; Monday is 0
        (local_day - uploaded).fill_null(0).cast(pl.Float32).alias("video_age_days"),
        *(
            pl.col(column).clip(0).log1p().fill_null(0.0).cast(pl.Float32).alias(f"log_{name}")
            for name, column in numbers.items()
        ),
    )
    return rows.with_columns(
        pl.col("tag").str.split(",").fill_null(pl.lit([], pl.List(pl.String))),
        pl.col("tag").str.split(",").list.first().fill_null("").alias("first_tag"),
    )


def _read_table(path: Path, columns: dict[str, type[pl.DataType]], key: str, rejects: Rejects) -> pl.DataFrame:
    blocks = list(read_csv_blocks(path, columns, rejects, required=[key]))
    return pl.concat(blocks).drop("line").unique(key, keep="first", maintain_order=True)
