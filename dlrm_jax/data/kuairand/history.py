"""What was known of user, video and author before an impression: past rates, and bags of recent clicks.

Everything is strictly earlier in ``time_ms``: impressions of equal time do not see each other. Blocks of impressions
come in order of time, and all impressions of one time lie in one block. Kept between blocks are sums for each key that
occurred and the last few impressions of each user, never the log.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Int

from dlrm_jax.data.kuairand.features import HISTORY_BAGS

TIME = "time_ms"
CLICK = "is_click"
LONG_VIEW = "long_view"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PastRate:
    """The click rate of earlier impressions that agree with this one in some columns.

    The rate is ``(clicks + strength * prior) / (impressions + strength)``.

    Attributes:
        name: Name of the rate; its dense features are ``past_NAME_rate``, ``past_NAME_count`` and so on.
        keys: Columns to agree in; none for all earlier impressions.
        prior: Name of the rate, earlier in the list, that this one starts from; None for one half.
        strength: How many impressions the prior weighs.
        emit: Which features to make: the rate, the count as log(1 + impressions), and the likewise smoothed rate of
            long views.
    """

    name: str
    keys: tuple[str, ...]
    prior: str | None
    strength: float
    emit: tuple[Literal["rate", "count", "long_view_rate"], ...] = ("rate",)


PAST_RATES = (
    PastRate(name="all", keys=(), prior=None, strength=100, emit=()),
    PastRate(name="tab", keys=("tab",), prior="all", strength=20, emit=("rate",)),
    PastRate(name="user", keys=("user_id",), prior="all", strength=5, emit=("rate", "count", "long_view_rate")),
    PastRate(name="video", keys=("video_id",), prior="all", strength=10, emit=("rate", "count", "long_view_rate")),
    PastRate(name="author", keys=("author_id",), prior="all", strength=10, emit=("rate", "count")),
    PastRate(name="music", keys=("music_id",), prior="all", strength=10, emit=("rate",)),
    PastRate(name="user_tab", keys=("user_id", "tab"), prior="tab", strength=5, emit=("rate", "count")),
    PastRate(name="video_tab", keys=("video_id", "tab"), prior="tab", strength=10, emit=("rate", "count")),
    PastRate(name="author_tab", keys=("author_id", "tab"), prior="tab", strength=10, emit=("rate", "count")),
    PastRate(name="tag_tab", keys=("first_tag", "tab"), prior="tab", strength=20, emit=("rate",)),
    PastRate(name="user_author", keys=("user_id", "author_id"), prior="user", strength=2, emit=("rate", "count")),
    PastRate(name="user_tag", keys=("user_id", "first_tag"), prior="user", strength=3, emit=("rate", "count")),
)
# Click rates over the user's last impressions; each weighs the user's whole past as much as two impressions.
RECENT_RATES = (1, 3, 5, 10, 20)
_RECENT_STRENGTH = 2.0
_NEVER_SECONDS = 30 * 86_400.0


def dense_history_names() -> tuple[str, ...]:
    """Returns the names of the dense features that `History.advance` makes, in order."""
    rates = [f"past_{rate.name}_{kind}" for rate in PAST_RATES for kind in rate.emit]
    recent = [f"past_user_rate_last_{count}" for count in RECENT_RATES]
    return (*rates, *recent, "log_seconds_since_impression", "log_seconds_since_click")


class PastSums:
    """Number of earlier impressions with the same key, and sums of some of their columns."""

    def __init__(self, keys: Sequence[str], values: Sequence[str]):
        """Starts without impressions.

        Args:
            keys: Columns that make the key, without nulls.
            values: Columns of integers to sum.
        """
        self._keys = list(keys)
        self._values = list(values)
        self._sums: pl.DataFrame | None = None

    def before(self, block: pl.DataFrame) -> pl.DataFrame:
        """Returns for each impression of the block the sums over earlier ones, and their number as ``count``."""
        rows = block.select(*self._keys, TIME, *self._values, pl.lit(1, pl.Int64).alias("count"))
        names = [*self._values, "count"]
        # Of tied impressions the first has the sum before all of them.
        rows = rows.with_columns(self._over(pl.col(name).cum_sum() - pl.col(name), self._keys) for name in names)
        rows = rows.with_columns(pl.col(name).first().over([*self._keys, TIME]) for name in names)
        if self._sums is None:
            return rows.select(names)
        if not self._keys:
            return rows.select(pl.col(name) + self._sums[name][0] for name in names)
        known = rows.select(self._keys).join(self._sums, on=self._keys, how="left", maintain_order="left")
        return rows.select(pl.col(name) + known[name].fill_null(0) for name in names)

    def record(self, block: pl.DataFrame) -> None:
        """Adds the impressions of a block, which is then in the past of the next."""
        names = [*self._values, "count"]
        new = block.select(*self._keys, *self._values, pl.lit(1, pl.Int64).alias("count"))
        both = new if self._sums is None else pl.concat([self._sums, new])
        sums = [pl.col(name).sum() for name in names]
        self._sums = both.group_by(self._keys, maintain_order=True).agg(sums) if self._keys else both.select(sums)

    @staticmethod
    def _over(expression: pl.Expr, keys: list[str]) -> pl.Expr:
        return expression.over(keys) if keys else expression


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecentEvents:
    """Each user's last few events (clicks, or impressions) of the past, as of the end of a block.

    Attributes:
        limit: Events kept for each user.
        events: Columns ``user_id``, ``time_ms`` and what is remembered of an event, sorted by user and time.
    """

    limit: int
    events: pl.DataFrame | None = None

    def before(self, block: pl.DataFrame, new: pl.DataFrame) -> "RecentView":
        """Finds the last events before each impression.

        Args:
            block: Impressions.
            new: The events of this block.

        Returns:
            The pool of known and new events, and each impression's range of it.
        """
        pool = self._pool(new)
        users, times = block["user_id"].to_numpy(), block[TIME].to_numpy()
        event_users, event_times = pool["user_id"].to_numpy(), pool[TIME].to_numpy()
        # Merged by user and time with impressions before events of the same time, the events counted up to an
        # impression are those of smaller users and its own user's strictly earlier ones.
        is_event = np.repeat([0, 1], [len(users), len(event_users)])
        order = np.lexsort((is_event, np.concatenate([times, event_times]), np.concatenate([users, event_users])))
        events_up_to = np.empty(len(order), np.int64)
        events_up_to[order] = np.cumsum(is_event[order])
        end = events_up_to[: len(users)]
        start = np.maximum(np.searchsorted(event_users, users, side="left"), end - self.limit)
        return RecentView(pool=pool, start=start, end=end)

    def after(self, new: pl.DataFrame) -> "RecentEvents":
        """Returns the memory after a block with these events."""
        pool = self._pool(new).group_by("user_id", maintain_order=True).tail(self.limit)
        return dataclasses.replace(self, events=pool)

    def _pool(self, new: pl.DataFrame) -> pl.DataFrame:
        both = new if self.events is None else pl.concat([self.events, new])
        return both.sort("user_id", TIME, maintain_order=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecentView:
    """Ranges of a pool of events, one for each impression, oldest event first.

    Attributes:
        pool: Events.
        start: First event of each impression's range.
        end: One beyond the last.
    """

    pool: pl.DataFrame
    start: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]

    def bags(self, column: str) -> pl.Series:
        """Returns a list for each impression: the column's values in its range."""
        lengths = self.end - self.start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.start - offsets[:-1], lengths) + np.arange(offsets[-1])
        values = self.pool[column].gather(pl.Series(places, dtype=pl.Int64))
        rows = pl.DataFrame({"row": np.repeat(np.arange(len(lengths)), lengths), column: values})
        bags = rows.group_by("row", maintain_order=True).agg(column)
        every = pl.DataFrame({"row": np.arange(len(lengths))})
        empty = pl.lit([], dtype=pl.List(values.dtype))
        return (
            every.join(bags, on="row", how="left", maintain_order="left")[column]
            .to_frame()
            .select(pl.col(column).fill_null(empty))[column]
        )

    def last(self, column: str) -> pl.Series:
        """Returns the column's value of the newest event of each range; null where the range is empty."""
        places = np.where(self.end > self.start, self.end - 1, -1)
        return self.pool[column].gather(pl.Series(places, dtype=pl.Int64).replace(-1, None))

    def sums(self, column: str, newest: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Returns the column's sum over the newest events of each range, and how many these are."""
        cumulative = np.concatenate([[0], np.cumsum(self.pool[column].to_numpy())])
        start = np.maximum(self.start, self.end - newest)
        return cumulative[self.end] - cumulative[start], self.end - start


class History:
    """The past of all impressions so far, and the features that come of it."""

    def __init__(self, max_recent: int):
        """Starts without impressions.

        Args:
            max_recent: Longest bag of recent clicks.
        """
        self._sums = {rate.name: PastSums(rate.keys, (CLICK, LONG_VIEW)) for rate in PAST_RATES}
        self._impressions = RecentEvents(limit=max(RECENT_RATES))
        self._clicks = RecentEvents(limit=max_recent)
        self._skips = RecentEvents(limit=max_recent)

    def advance(self, block: pl.DataFrame) -> pl.DataFrame:
        """Returns the features of each impression of the next block, which is in the past from then on.

        Args:
            block: Impressions in order of time: ``user_id``, ``video_id``, ``author_id``, ``music_id``, ``first_tag``,
                ``tab``, ``time_ms``, ``is_click`` and ``long_view``, without nulls.

        Returns:
            The dense features, as `dense_history_names` lists them, and the bags of `HISTORY_BAGS`, of raw values.
        """
        rates = self._rates(block)
        impressions = self._impressions.before(block, block.select("user_id", TIME, CLICK))
        features: dict[str, np.ndarray | pl.Series] = dict(rates)
        for newest in RECENT_RATES:
            num_clicked, count = impressions.sums(CLICK, newest)
            rate = (num_clicked + _RECENT_STRENGTH * rates["past_user_rate"]) / (count + _RECENT_STRENGTH)
            features[f"past_user_rate_last_{newest}"] = rate
        remembered = ["user_id", TIME, "video_id", "author_id", "first_tag"]
        clicked = block.filter(pl.col(CLICK) == 1).select(remembered)
        skipped = block.filter(pl.col(CLICK) == 0).select(remembered)
        clicks = self._clicks.before(block, clicked)
        skips = self._skips.before(block, skipped)
        for name, view in (("seconds_since_impression", impressions), ("seconds_since_click", clicks)):
            seconds = ((block[TIME] - view.last(TIME)) / 1000.0).fill_null(_NEVER_SECONDS)
            features[f"log_{name}"] = seconds.log1p()
        features["recent_clicked_videos"] = clicks.bags("video_id")
        features["recent_clicked_authors"] = clicks.bags("author_id")
        features["recent_clicked_tags"] = clicks.bags("first_tag")
        features["recent_skipped_videos"] = skips.bags("video_id")
        self._impressions = self._impressions.after(block.select("user_id", TIME, CLICK))
        self._clicks = self._clicks.after(clicked)
        self._skips = self._skips.after(skipped)
        return pl.DataFrame(features).select(*dense_history_names(), *HISTORY_BAGS)

    def _rates(self, block: pl.DataFrame) -> dict[str, np.ndarray]:
        """Returns every past rate, those that only serve as priors included."""
        features: dict[str, np.ndarray] = {}
        for rate in PAST_RATES:
            sums = self._sums[rate.name].before(block)
            self._sums[rate.name].record(block)
            count = sums["count"].to_numpy()
            for kind, value in (("rate", CLICK), ("long_view_rate", LONG_VIEW)):
                prior = features[f"past_{rate.prior}_{kind}"] if rate.prior else 0.5
                smoothed = (sums[value].to_numpy() + rate.strength * prior) / (count + rate.strength)
                features[f"past_{rate.name}_{kind}"] = smoothed
            features[f"past_{rate.name}_count"] = np.log1p(count)
        return features
