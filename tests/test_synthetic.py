"""The synthetic click log: deterministic, resumable, Zipf-distributed, and with the attainable figures it claims."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest
from full_disk import files_of_at_most

from dlrm_jax.data.card import read_card
from dlrm_jax.data.synthetic import PROBABILITY, SyntheticSpec, generate_block, prepare_synthetic
from sharding.errors import InputError

SMALL = SyntheticSpec(
    num_train=70_000, num_validation=3_000, num_test=5_000, num_dense=3, single_rows=(4, 50), bag_rows=(30,)
)


def read_split(folder, split):
    return pl.read_parquet(folder / split / "part-*.parquet")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    return folder, prepare_synthetic(folder, config=SMALL)


def test_dataset_has_the_splits_and_columns_that_the_card_names(dataset):
    folder, card = dataset
    assert read_card(folder) == card
    assert not (folder / "begun.json").exists()
    for split, count in (("train", 70_000), ("validation", 3_000), ("test", 5_000)):
        rows = read_split(folder, split)
        assert rows.height == card.splits[split].num_samples == count
        assert rows.columns == ["label", "dense_0", "dense_1", "dense_2", "id_0", "id_1", "bag_0", PROBABILITY]
        assert rows["label"].mean() == pytest.approx(card.splits[split].positive_rate, rel=1e-6)
    assert rows["id_0"].min() >= 0
    assert rows["id_0"].max() < 4
    assert rows["bag_0"].list.len().min() == 0
    assert card.feature("bag_0").max_pooling_factor <= 20


def test_ids_are_zipf_distributed_and_frequent_ids_do_not_lie_side_by_side(dataset):
    _, card = dataset
    frequencies = card.feature("id_1").frequencies
    assert frequencies is not None
    counts = np.array([count for _, count in frequencies.top], float)
    # The distribution of x ** -1.2 on [1, 51), rounded down.
    edges = np.arange(1, 52) ** -0.2
    expected = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1]) * frequencies.total
    np.testing.assert_allclose(counts[:10], expected[:10], atol=5 * math.sqrt(70_000 * 0.25), rtol=0)
    top = [row for row, _ in frequencies.top[:5]]
    assert top != sorted(top)
    assert len({row for row, _ in frequencies.top}) == 50


def test_probability_is_calibrated_and_attainable_figures_are_those_of_sorting_all_samples(dataset):
    folder, card = dataset
    rows = read_split(folder, "test")
    label, probability = rows["label"].to_numpy(), rows[PROBABILITY].to_numpy().astype(float)
    # Five standard deviations of a mean of 5,000 labels.
    assert abs(label.mean() - probability.mean()) < 5 * 0.5 / math.sqrt(5_000)
    log_loss = -np.mean(np.where(label > 0, np.log(probability), np.log1p(-probability)))
    rate = label.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    higher = probability[label > 0][:, None] > probability[label == 0][None, :]
    attainable = card.attainable["test"]
    assert attainable["log_loss"] == pytest.approx(log_loss, rel=1e-6)
    assert attainable["ne"] == pytest.approx(log_loss / entropy, rel=1e-6)
    # 2**20 bins: pairs of a positive and a negative sample in one bin are rare.
    assert attainable["auc"] == pytest.approx(higher.mean(), abs=1e-5)


def test_planted_effects_explain_the_probability(dataset):
    """A least-squares fit of the logit on dense features and ids leaves the bag and the interaction alone."""
    folder, _ = dataset
    rows = read_split(folder, "test")
    logit = np.log(rows[PROBABILITY] / (1 - rows[PROBABILITY])).to_numpy()
    one_hot = [np.eye(size)[rows[name].to_numpy()] for name, size in (("id_0", 4), ("id_1", 50))]
    pairs = np.eye(200)[rows["id_0"].to_numpy() * 50 + rows["id_1"].to_numpy()]
    lengths = np.repeat(np.arange(rows.height), rows["bag_0"].list.len().to_numpy())
    bag = np.zeros((rows.height, 30))
    np.add.at(bag, (lengths, rows["bag_0"].explode().drop_nulls().to_numpy()), 1.0)
    dense = rows.select(pl.col("^dense_.*$")).to_numpy()

    def residual(*parts):
        design = np.concatenate(parts, axis=1)
        return np.std(logit - design @ np.linalg.lstsq(design, logit, rcond=None)[0])

    assert residual(dense, *one_hot, bag, pairs) < 1e-3  # all of the model; float32 probabilities
    assert residual(dense, *one_hot, bag) > 0.01  # the interaction of the first two features is missing
    assert residual(dense, *one_hot) > 0.1


def test_samples_depend_on_seed_split_and_block_alone():
    first = generate_block(SMALL, "train", 1)
    assert first.equals(generate_block(SMALL, "train", 1))
    assert first.equals(generate_block(dataclasses.replace(SMALL, num_test=1), "train", 1))
    for other in (
        generate_block(dataclasses.replace(SMALL, seed=1), "train", 1),
        generate_block(SMALL, "test", 1),
        generate_block(SMALL, "train", 0),
    ):
        assert not first.column("dense_0").equals(other.column("dense_0"))


def test_preparation_when_interrupted_then_complete_files_stay_and_the_result_is_the_same(dataset, tmp_path):
    folder, card = dataset
    again = tmp_path / "again"
    stopped = []

    def stop_after_training(done, total):
        stopped.append((done, total))
        if done == 70_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_synthetic(again, config=SMALL, progress=stop_after_training)
    assert stopped == [(70_000, 78_000)]
    finished = next((again / "train").iterdir())
    written = finished.stat().st_mtime_ns
    assert prepare_synthetic(again, config=SMALL) == card
    assert finished.stat().st_mtime_ns == written
    for split in card.splits:
        for path in (folder / split).iterdir():
            assert path.read_bytes() == (again / split / path.name).read_bytes()


def test_preparation_when_the_folder_is_of_another_spec_then_error_names_the_setting(dataset, tmp_path):
    folder, card = dataset
    assert prepare_synthetic(folder, config=SMALL) == card
    with pytest.raises(InputError, match="made with seed = 0, now asked for 5"):
        prepare_synthetic(folder, config=dataclasses.replace(SMALL, seed=5))
    (tmp_path / "notes.txt").write_text("something else")
    with pytest.raises(InputError, match="not empty"):
        prepare_synthetic(tmp_path, config=SMALL)


def test_preparation_when_the_disk_is_full_then_error_names_the_folder_and_it_resumes(tmp_path):
    spec = dataclasses.replace(SMALL, num_train=100, num_validation=2000, num_test=10)
    out = tmp_path / "out"
    at_begin, at_train, at_validation = 100, 1000, 20_000
    for size, written in ((at_begin, set()), (at_train, set()), (at_validation, {"train"})):
        with files_of_at_most(size), pytest.raises(InputError) as refused:
            prepare_synthetic(out, config=spec)
        assert str(refused.value) == f"{out}: cannot be written (File too large); give another --out"
        assert {path.parent.name for path in out.glob("*/*")} == written
    assert prepare_synthetic(out, config=spec) == prepare_synthetic(tmp_path / "whole", config=spec)


def test_preparation_when_another_process_is_at_work_in_the_folder_then_it_is_refused(tmp_path):
    def start_another(*_):
        with pytest.raises(InputError, match="another process is preparing a dataset there"):
            prepare_synthetic(tmp_path / "out", config=spec, overwrite=True)

    spec = dataclasses.replace(SMALL, num_train=100, num_validation=10, num_test=10)
    assert prepare_synthetic(tmp_path / "out", config=spec, progress=start_another).splits["train"].num_samples == 100


def test_weighted_bags_have_one_weight_beside_each_id():
    rows = pl.from_arrow(generate_block(dataclasses.replace(SMALL, weighted_bags=True), "train", 0))
    assert isinstance(rows, pl.DataFrame)
    assert (rows["bag_0"].list.len() == rows["bag_0_weight"].list.len()).all()
    weights = rows["bag_0_weight"].explode().drop_nulls()
    assert 0.5 <= weights.min() < weights.max() < 1.5


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0])
def test_zipf_exponent_of_any_size_stays_inside_the_table(exponent):
    spec = dataclasses.replace(SMALL, zipf_exponent=exponent, single_rows=(1, 2**31 - 1))
    rows = generate_block(spec, "train", 0)
    ids = rows.column("id_1").to_numpy()
    assert ids.min() >= 0
    assert ids.max() < 2**31 - 1
    assert set(rows.column("id_0").to_numpy()) == {0}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_train": 0}, "num_train"),
        ({"single_rows": (5, 0)}, r"single_rows\[1\]"),
        ({"bag_rows": (2**31,)}, r"bag_rows\[0\]"),
        ({"bias": float("inf")}, "bias"),
        ({"num_interactions": 2}, "num_interactions"),
        ({"mean_pooling_factor": float("nan")}, "mean_pooling_factor"),
        ({"seed": -1}, "seed"),
    ],
)
def test_spec_when_a_setting_is_out_of_its_limits_then_error_names_it(tmp_path, change, field):
    with pytest.raises(InputError, match=rf"{field}.* must lie in \["):
        prepare_synthetic(tmp_path / "out", config=dataclasses.replace(SMALL, **change))
    assert not (tmp_path / "out").exists()


def test_spec_when_there_are_too_few_features_for_the_default_then_error_names_what_to_give(tmp_path):
    with pytest.raises(InputError, match=r"\(--single_rows\) are 1: give --num_interactions 0, or more --single_rows"):
        prepare_synthetic(tmp_path / "out", config=SyntheticSpec(single_rows=(1,), bag_rows=(1,)))
