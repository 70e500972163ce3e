"""KuaiRand: the split of its README, history without leaks, malformed lines to the rejects."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from full_disk import files_of_at_most

from dlrm_jax.data.card import read_card
from dlrm_jax.data.folder_lock import exclusive
from dlrm_jax.data.kuairand import prepare_kuairand
from dlrm_jax.data.kuairand.features import HISTORY_BAGS, PLAIN_DENSE, SINGLE_FEATURES
from dlrm_jax.data.kuairand.history import PAST_RATES, RECENT_RATES, History, dense_history_names
from dlrm_jax.data.kuairand.log import log_files, read_days, spill_days
from dlrm_jax.data.kuairand.vocabulary import ValueCounts
from dlrm_jax.data.rejects import Rejects
from dlrm_jax.data.vocabulary_digest import vocabulary_digest
from sharding.errors import InputError

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "kuairand"
MAX_RECENT = 4
# The list of what is known only after the click.
FORBIDDEN = (
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "play_time_ms"),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter"),
)


# --- history


def random_impressions(count: int = 160, seed: int = 0) -> pl.DataFrame:
    """A log in order of time, with many impressions of one time, repeated videos and heavy users."""
    rng = np.random.default_rng(seed)
    clicks = rng.integers(0, 2, count)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 4, count),
            "video_id": rng.integers(0, 6, count),
            "author_id": rng.integers(0, 3, count),
            "music_id": rng.choice(["", "a", "b"], count),
            "first_tag": rng.choice(["", "9", "39"], count),
            "tab": rng.integers(0, 2, count),
            "time_ms": np.sort(rng.integers(0, count // 3, count)) * 1000,
            "is_click": clicks,
            "long_view": clicks * rng.integers(0, 2, count),
        }
    )


def history_of(log: pl.DataFrame, cuts: tuple[int, ...]) -> pl.DataFrame:
    """The features of a log that is given in blocks, cut before the times given (in seconds)."""
    history = History(MAX_RECENT)
    ends = [-1, *(1000 * cut for cut in cuts), 10**9]
    blocks = [
        log.filter((pl.col("time_ms") >= start) & (pl.col("time_ms") < end)) for start, end in itertools.pairwise(ends)
    ]
    return pl.concat([history.advance(block) for block in blocks])


def direct_history(log: pl.DataFrame) -> list[dict]:
    """The same features by looking at all earlier impressions of each impression."""
    rows = log.to_dicts()
    return [direct_features(row, [other for other in rows if other["time_ms"] < row["time_ms"]]) for row in rows]


def direct_features(row: dict, earlier: list[dict]) -> dict:
    features, rates = {}, {}
    for rate in PAST_RATES:
        same = [other for other in earlier if all(other[key] == row[key] for key in rate.keys)]
        for kind, label in (("rate", "is_click"), ("long_view_rate", "long_view")):
            prior = rates[rate.prior, kind] if rate.prior else 0.5
            positives = sum(other[label] for other in same)
            rates[rate.name, kind] = (positives + rate.strength * prior) / (len(same) + rate.strength)
            features[f"past_{rate.name}_{kind}"] = rates[rate.name, kind]
        features[f"past_{rate.name}_count"] = math.log1p(len(same))
    own = [other for other in earlier if other["user_id"] == row["user_id"]]
    for count in RECENT_RATES:
        last = own[-count:]
        clicks = sum(other["is_click"] for other in last)
        features[f"past_user_rate_last_{count}"] = (clicks + 2 * rates["user", "rate"]) / (len(last) + 2)
    clicked = [other for other in own if other["is_click"]]
    skipped = [other for other in own if not other["is_click"]]
    for name, events in (("seconds_since_impression", own), ("seconds_since_click", clicked)):
        seconds = (row["time_ms"] - events[-1]["time_ms"]) / 1000 if events else 30 * 86400
        features[f"log_{name}"] = math.log1p(seconds)
    features["recent_clicked_videos"] = [other["video_id"] for other in clicked[-MAX_RECENT:]]
    features["recent_clicked_authors"] = [other["author_id"] for other in clicked[-MAX_RECENT:]]
    features["recent_clicked_tags"] = [other["first_tag"] for other in clicked[-MAX_RECENT:]]
    features["recent_skipped_videos"] = [other["video_id"] for other in skipped[-MAX_RECENT:]]
    return features


@pytest.mark.parametrize("cuts", [(), (25,), (1, 20, 20, 40)], ids=["one block", "two", "five, one of them empty"])
@pytest.mark.parametrize("seed", [0, 1])
def test_history_equals_looking_at_all_earlier_impressions(cuts, seed):
    log = random_impressions(seed=seed)
    features = history_of(log, cuts)
    direct = direct_history(log)
    assert features.columns == [*dense_history_names(), *HISTORY_BAGS]
    for name in dense_history_names():
        np.testing.assert_allclose(features[name].to_numpy(), [row[name] for row in direct], rtol=1e-12, err_msg=name)
    for name in HISTORY_BAGS:
        assert features[name].to_list() == [row[name] for row in direct], name


def test_history_when_labels_change_from_a_time_on_then_no_feature_up_to_it_changes():
    log = random_impressions(seed=3)
    for time in log["time_ms"].gather([0, 40, 90, 150]):
        later = pl.col("time_ms") >= time
        altered = log.with_columns(
            pl.when(later).then(1 - pl.col("is_click")).otherwise("is_click").alias("is_click"),
            pl.when(later).then(1 - pl.col("long_view")).otherwise("long_view").alias("long_view"),
        )
        before, after = (history_of(version, (30,)).filter(log["time_ms"] <= time) for version in (log, altered))
        assert before.height >= 1
        assert before.equals(after)


def test_history_of_the_first_impressions_is_the_prior_and_empty_bags():
    features = history_of(random_impressions().with_columns(pl.lit(5000).alias("time_ms")), ())
    assert set(features["past_user_rate"].to_list()) == {0.5}
    assert set(features["past_video_count"].to_list()) == {0.0}
    assert features["recent_clicked_videos"].list.len().sum() == 0


# --- vocabularies


def test_vocabulary_is_ordered_by_count_then_value_and_rare_values_have_id_0():
    counts = ValueCounts()
    counts.add(pl.Series("tag", [["9", "3"], ["9"], [], None, ["39", "3"]]))
    counts.add(pl.Series("tag", [["9", "12"], ["12"]]))
    vocabulary = counts.vocabulary(min_count=2)
    assert vocabulary.entries["value"].to_list() == ["9", "12", "3"]
    assert vocabulary.entries["count"].to_list() == [3, 2, 2]
    assert vocabulary.num_rows == 4
    assert vocabulary.ids(pl.Series("tag", ["3", "39", None, "9"])).to_list() == [3, 0, 0, 1]
    assert vocabulary.ids(pl.Series("tag", [["9", "39"], None, [], ["12"]])).to_list() == [[1, 0], [], [], [2]]


# --- files

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{i}" for i in range(18))
)
VIDEO_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)
SECOND = 1_651_680_000_000  # 5 May 2022, 00:00 in China


def log_line(user, video, date, time_ms, click, tab=1):
    return f"{user},{video},{date},0,{time_ms},{click},0,0,0,0,0,{click},900,9000,0,0,0,0,{tab}"


def write_source(folder, lines, *, users=3, videos=4):
    folder.mkdir(parents=True, exist_ok=True)
    half = len(lines) // 2
    (folder / "log_standard_a.csv").write_text("\n".join([LOG_HEADER, *lines[:half]]) + "\n")
    (folder / "log_standard_b.csv").write_text("\n".join([LOG_HEADER, *lines[half:]]) + "\n")
    user_lines = [
        f'{i},full_active,0,1,1,{i * 10},"(0,10]",5,"[1,10)",2,"[1,5)",300,181-365,' + ",".join(["0"] * 18)
        for i in range(users)
    ]
    (folder / "user_features_pure.csv").write_text("\n".join([USER_HEADER, *user_lines]) + "\n")
    video_lines = [f'{i},{i % 2},NORMAL,2022-04-10,Web,0.0,9000.0,720.0,1280.0,77,9.0,"9,{i}"' for i in range(videos)]
    (folder / "video_features_basic_pure.csv").write_text("\n".join([VIDEO_HEADER, *video_lines]) + "\n")
    return folder


def some_lines(seed=0):
    """Sixty impressions of three users over three days, in no order of time."""
    rng = np.random.default_rng(seed)
    days = [(20220504, -86_400_000), (20220505, 0), (20220506, 86_400_000)]
    return [
        log_line(rng.integers(3), rng.integers(4), date, SECOND + shift + 1000 * int(rng.integers(40)), rng.integers(2))
        for _ in range(20)
        for date, shift in days
    ]


def read_split(folder, split):
    return pl.read_parquet(folder / split / "part-*.parquet")


def test_dataset_when_prepared_then_columns_and_card_agree_and_nothing_forbidden_is_a_feature(tmp_path):
    source = write_source(tmp_path / "source", some_lines())
    card = prepare_kuairand(source, tmp_path / "out", min_count=1)
    assert read_card(tmp_path / "out") == card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("card.json", "test", "train", "validation", "vocabulary")
    ]
    names = [column.name for column in (*card.dense, *card.sparse)]
    assert not set(names) & set(FORBIDDEN)
    assert names == [*PLAIN_DENSE, *dense_history_names(), *SINGLE_FEATURES, "tag", *HISTORY_BAGS]
    for split, summary in card.splits.items():
        rows = read_split(tmp_path / "out", split)
        assert rows.columns == ["label", *names]
        assert rows.height == summary.num_samples
        assert rows.null_count().sum_horizontal()[0] == 0
    video, recent = card.feature("video_id"), card.feature("recent_clicked_videos")
    assert (recent.num_rows, recent.vocabulary) == (video.num_rows, video.vocabulary)
    assert recent.vocabulary_digest == video.vocabulary_digest == vocabulary_digest(tmp_path / "out" / video.vocabulary)
    vocabulary = pl.read_parquet(tmp_path / "out" / (video.vocabulary or ""))
    assert vocabulary["id"].to_list() == list(range(video.num_rows))
    assert vocabulary["value"][0] is None


def test_history_when_splits_follow_each_other_then_it_crosses_them(tmp_path):
    lines = [
        log_line(0, 1, 20220504, SECOND - 5000, 1),
        log_line(0, 2, 20220505, SECOND + 5000, 1),
        log_line(0, 3, 20220506, SECOND + 90_000_000, 0),
    ]
    prepare_kuairand(write_source(tmp_path / "source", lines), tmp_path / "out", min_count=1)
    counts = [read_split(tmp_path / "out", split)["past_user_count"][0] for split in ("train", "validation", "test")]
    np.testing.assert_allclose(np.expm1(counts), [0, 1, 2], rtol=1e-6)
    # Video 1 alone is in the training split's vocabulary; video 2 was seen later.
    assert read_split(tmp_path / "out", "test")["recent_clicked_videos"].to_list() == [[1, 0]]


def test_impressions_of_unknown_users_and_videos_have_id_0_and_are_not_rejected(tmp_path):
    lines = [*some_lines(), log_line(99, 98, 20220504, SECOND - 1, 1)]
    prepare_kuairand(write_source(tmp_path / "source", lines), tmp_path / "out", min_count=2)
    last = read_split(tmp_path / "out", "train").tail(1)
    ids = last.select("user_id", "video_id", "author_id", "user_active_degree", "music_id").row(0)
    assert ids == (0, 0, 0, 0, 0)
    assert last["tag"].to_list() == [[]]
    assert last["log_video_duration"].item() == 0
    assert not (tmp_path / "out" / "rejects.csv").exists()


def test_exact_duplicates_are_dropped_and_the_splits_are_those_of_the_date(tmp_path):
    lines = [log_line(i % 3, i % 4, 20220504 + i % 3, SECOND + i + (i % 3 - 1) * 86_400_000, i % 2) for i in range(30)]
    seen: list[tuple[int, int]] = []
    source = write_source(tmp_path / "source", lines + lines[::2])
    card = prepare_kuairand(source, tmp_path / "out", progress=lambda *done: seen.append(done))
    # Lines that were dropped are done, too.
    assert seen[-1][0] == seen[-1][1] > 0
    assert {name: split.num_samples for name, split in card.splits.items()} == dict.fromkeys(card.splits, 10)


def test_preparation_is_deterministic_and_independent_of_the_order_of_lines(tmp_path):
    lines = [log_line(i % 3, i % 4, 20220504 + i % 3, SECOND + i + (i % 3 - 1) * 86_400_000, i % 2) for i in range(90)]
    cards = []
    for name, order in (("a", lines), ("b", lines), ("c", lines[::-1])):
        cards.append(prepare_kuairand(write_source(tmp_path / name, order), tmp_path / f"out_{name}"))
    assert cards[0] == cards[1] == cards[2]
    for other in ("out_b", "out_c"):
        for path in sorted((tmp_path / "out_a").rglob("*.parquet")):
            assert path.read_bytes() == (tmp_path / other / path.relative_to(tmp_path / "out_a")).read_bytes()


def test_malformed_lines_go_to_the_rejects_with_file_line_and_reason(tmp_path):
    good = log_line(0, 1, 20220504, SECOND, 1)
    bad = {
        "1,2,3": "3 fields instead of 19",
        good.replace("0,1,2022", "x,1,2022"): "user_id is not a number",
        good.replace(f",{SECOND},1", f",{SECOND},2"): "is_click is not 0 or 1",
        good.replace("20220504", "20221304"): "date is not a date YYYYMMDD",
        good.replace("20220504", "20220404"): "time_ms is far from date",
        good.replace("0,1,2022", ",1,2022"): "user_id is empty",
        good.replace("0,1,2022", '"0,1,2022'): "quotes do not match",
        good.replace(str(SECOND), str(2**64)): "time_ms is not a number",
        "": "1 fields instead of 19",
    }
    lines = [*some_lines(), *bad]
    source = write_source(tmp_path / "source", lines)
    card = prepare_kuairand(source, tmp_path / "out", max_reject_share=0.5)
    clean = prepare_kuairand(write_source(tmp_path / "clean", some_lines()), tmp_path / "out_clean")
    assert card.splits == clean.splits
    rejects = list(csv.DictReader((tmp_path / "out" / "rejects.csv").read_text().splitlines()))
    assert sorted(row["reason"] for row in rejects) == sorted(bad.values())
    first = len(lines) // 2
    by_line = {f"{source / 'log_standard_b.csv'}:{i + 2 - first}": text for i, text in enumerate(lines) if text in bad}
    assert {f"{row['file']}:{row['line']}" for row in rejects} == set(by_line)
    assert all(bad[by_line[f"{row['file']}:{row['line']}"]] == row["reason"] for row in rejects)


def test_preparation_when_too_many_lines_are_malformed_then_it_stops_and_leaves_no_dataset(tmp_path):
    source = write_source(tmp_path / "source", [*some_lines(), "nonsense", "more nonsense"])
    with pytest.raises(InputError, match="1 fields instead of 19"):
        prepare_kuairand(source, tmp_path / "out")
    assert not (tmp_path / "out" / "card.json").exists()
    assert not (tmp_path / "out" / ".prepare").exists()
    assert prepare_kuairand(source, tmp_path / "out", max_reject_share=0.1).splits["train"].num_samples > 0


def test_preparation_when_files_or_columns_are_missing_then_error_names_them(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        prepare_kuairand(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match=r"no log_standard\*\.csv there"):
        prepare_kuairand(tmp_path, tmp_path / "out")
    source = write_source(tmp_path / "source", some_lines())
    text = (source / "log_standard_b.csv").read_text()
    (source / "log_standard_b.csv").write_text(text.replace("is_click", "clicked", 1))
    with pytest.raises(InputError, match=r"log_standard_b\.csv: column 'is_click' is missing"):
        prepare_kuairand(source, tmp_path / "out")
    (source / "user_features_pure.csv").unlink()
    with pytest.raises(InputError, match=r"user_features_pure\.csv: no such file"):
        prepare_kuairand(source, tmp_path / "out")


def test_preparation_when_a_split_is_empty_then_error_names_it(tmp_path):
    source = write_source(tmp_path / "source", [line for line in some_lines() if "20220505" not in line])
    with pytest.raises(InputError, match="no impression belongs to the validation split"):
        prepare_kuairand(source, tmp_path / "out")


def test_preparation_when_a_setting_is_out_of_its_limits_then_error_names_it(tmp_path):
    with pytest.raises(InputError, match="features is 'all'"):
        prepare_kuairand(tmp_path, tmp_path / "out", features="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="max_recent 0"):
        prepare_kuairand(tmp_path, tmp_path / "out", max_recent=0)
    with pytest.raises(InputError, match=r"--max_reject_share is -1, but it must lie in \[0, 1\]"):
        prepare_kuairand(write_source(tmp_path / "source", some_lines()), tmp_path / "out", max_reject_share=-1)
    assert not (tmp_path / "out").exists()


def test_preparation_when_a_log_is_there_twice_then_error_names_both(tmp_path):
    source = write_source(tmp_path / "source", some_lines())
    (source / "log_standard_c.csv").symlink_to(source / "log_standard_b.csv")
    with pytest.raises(InputError, match=r"log_standard_c\.csv: the same file as .*log_standard_b\.csv"):
        prepare_kuairand(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preparation_when_the_source_lies_in_the_folder_then_nothing_is_removed(tmp_path):
    source = write_source(tmp_path / "out" / "train", some_lines())
    files = sorted(source.iterdir())
    with pytest.raises(InputError, match=r"lies in .*out, where the dataset goes"):
        prepare_kuairand(source, tmp_path / "out", overwrite=True)
    assert sorted(source.iterdir()) == files


def test_preparation_when_the_disk_is_full_then_error_names_the_folder_and_it_can_be_made_later(tmp_path):
    source = write_source(tmp_path / "source", some_lines())
    out = tmp_path / "out"
    at_begin, at_vocabulary, at_rows = 100, 1_000, 20_000
    for size in (at_begin, at_vocabulary, at_rows):
        with files_of_at_most(size), pytest.raises(InputError) as refused:
            prepare_kuairand(source, out)
        assert str(refused.value) == f"{out}: cannot be written (File too large); give another --out"
        assert not (out / ".prepare").exists()
    card = prepare_kuairand(source, out)
    for split, summary in card.splits.items():
        assert read_split(out, split).height == summary.num_samples
    assert not list(out.rglob("*.partial"))


def test_preparation_when_the_folder_cannot_be_used_then_error_names_it(tmp_path):
    source = write_source(tmp_path / "source", some_lines())
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file", r"file: cannot be written \(File exists\); give another --out"),
        (tmp_path / "file" / "out", r"out: cannot be written \(Not a directory\); give another --out"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_kuairand(source, out)
    with (
        exclusive(tmp_path / "out", what="preparing a dataset", instead="another --out"),
        pytest.raises(InputError, match="out: another process is preparing a dataset there"),
    ):
        prepare_kuairand(source, tmp_path / "out")


def test_published_log_when_read_then_splits_have_the_sizes_of_its_readme(tmp_path):
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is absent")
    with Rejects(tmp_path / "rejects.csv") as rejects:
        days = spill_days(log_files(PUBLISHED), tmp_path / "days", rejects)
    dates = pl.concat([day["date"] for day in read_days(days)])
    sizes = (dates <= 20220504).sum(), (dates == 20220505).sum(), (dates >= 20220506).sum()
    assert sizes == (167_281, 13_103, 42_485)
    assert rejects.rejected == 0
