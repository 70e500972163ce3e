"""Predictor: rows of any kind, any number of them, from a checkpoint to probabilities."""

import dataclasses
import json
import logging
import re
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest
import tiny

from dlrm_jax.config import MeshConfig
from dlrm_jax.data.card import DenseColumn, write_card
from dlrm_jax.metrics import ExactMetrics
from dlrm_jax.predict import Predictor
from scripts import eval as eval_script
from scripts.one_line_errors import run
from sharding import InputError
from sharding.checkpoint import restore_tables

ROWS = tiny.samples(tiny.NUM_SAMPLES["test"], 2)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.train_quietly(tiny.config(tiny.write_dataset(folder / "data"), folder / "run", max_steps=6))
    return Predictor(folder / "run")


def changed(**columns) -> pl.DataFrame:
    """The first three rows with other columns."""
    return ROWS[:3].with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def test_probabilities_when_rows_come_as_different_types_then_they_are_the_same(predictor):
    expected = predictor.predict(ROWS)
    assert expected.shape == (len(ROWS),)
    assert expected.dtype == np.float32
    assert 0 < expected.min() < expected.max() < 1
    for rows in (
        ROWS.to_arrow(),
        ROWS.to_arrow().to_batches()[0],
        ROWS.to_dict(as_series=False),
        ROWS.drop("label", "weight"),
    ):
        np.testing.assert_array_equal(predictor.predict(rows), expected)
    batch = predictor.batch(ROWS.to_arrow())
    assert batch.label.shape == (128,)
    np.testing.assert_array_equal(predictor.predict(batch)[: len(ROWS)], expected)


def test_probabilities_when_their_metrics_are_computed_then_they_are_those_of_evaluate(predictor):
    metrics = predictor.evaluate("test")
    probability = predictor.predict(ROWS).astype(np.float64)
    exact = ExactMetrics()
    exact.update(np.log(probability) - np.log1p(-probability), ROWS["label"].to_numpy(), np.ones(len(ROWS)))
    expected = exact.compute()
    assert metrics.num_samples == len(ROWS)
    # Another batch size, and logits through float32 probabilities and back.
    for name in ("auc", "ne", "log_loss", "accuracy", "calibration"):
        assert getattr(metrics, name) == pytest.approx(getattr(expected, name), abs=1e-5), name


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_probabilities_when_there_are_fewer_rows_then_they_are_those_of_the_first(predictor, count):
    probabilities = predictor.predict(ROWS[:count])
    assert probabilities.shape == (count,)
    # Sums may be cut differently for another batch size.
    np.testing.assert_allclose(probabilities, predictor.predict(ROWS)[:count], rtol=1e-5)


def test_probabilities_when_all_bags_are_empty_and_ids_missing_then_columns_without_a_type_are_understood(predictor):
    rows = {"age": [0.5, 1.0], "price": [0, 2], "user": [None, None], "item": [3, None], "tags": [[], []]}
    typed = pl.DataFrame(rows, schema_overrides={"user": pl.Int64, "tags": pl.List(pl.Int64)})
    np.testing.assert_array_equal(predictor.predict(rows), predictor.predict(typed))
    np.testing.assert_array_equal(predictor.predict(pl.DataFrame(rows)), predictor.predict(typed))


@pytest.mark.parametrize("label", [None, float("nan"), 7.0, "unknown"])
def test_probabilities_when_labels_are_not_known_then_they_are_those_without_labels(predictor, label):
    for rows in (ROWS, ROWS.with_columns(label=pl.lit(label))):
        np.testing.assert_array_equal(predictor.predict(rows), predictor.predict(ROWS.drop("label")))


def test_probabilities_when_samples_have_weights_then_they_are_those_without_also_where_a_weight_is_0(tmp_path):
    data = tiny.write_dataset(tmp_path / "data", sample_weight="weight")
    tiny.train_quietly(tiny.config(data, tmp_path / "run", max_steps=2))
    weighted = Predictor(tmp_path / "run")
    assert (ROWS["weight"] == 0).any()
    np.testing.assert_array_equal(weighted.predict(ROWS), weighted.predict(ROWS.drop("weight")))


def test_probabilities_when_lists_are_empty_then_there_are_none(predictor):
    assert predictor.predict({name: [] for name in ROWS.columns}).shape == (0,)


def test_probabilities_when_the_checkpoint_is_restored_on_a_mesh_then_they_are_those_of_one_device(predictor):
    spread = Predictor(predictor._workdir.path, mesh=MeshConfig(nodes=2, chips=2))
    assert spread.recommender.tables.num_devices == 4
    # Sums of the dense part may be cut differently for another batch size.
    for count in (1, 100):
        np.testing.assert_allclose(spread.predict(ROWS[:count]), predictor.predict(ROWS[:count]), rtol=1e-5)


def test_evaluation_when_the_dataset_was_prepared_otherwise_since_then_it_is_refused_and_other_samples_are_not(
    predictor, tmp_path
):
    again = tiny.write_dataset(tmp_path / "again", change=lambda table: table.with_columns(age=0.0))
    assert predictor.evaluate("test", path=str(again)) == predictor.evaluate("test")
    assert predictor.evaluate("train", path=str(again)) != predictor.evaluate("train")
    write_card(tiny.card(dense=(DenseColumn(name="age", mean=1.0), tiny.card().dense[1])), again)
    with pytest.raises(InputError, match=r"card.json: dense.age.mean is 1.0, but the model was trained with 0.0: give"):
        predictor.evaluate("test", path=str(again))


def test_predictor_when_its_devices_do_not_divide_the_batches_of_the_training_then_it_evaluates_all_the_same(predictor):
    odd = Predictor(predictor._workdir.path, mesh=MeshConfig(chips=3))
    assert odd.evaluate("test").log_loss == pytest.approx(predictor.evaluate("test").log_loss, rel=1e-5)


def test_predictor_when_its_devices_do_not_divide_the_batches_of_a_stale_run_then_it_evaluates_all_the_same(tmp_path):
    data = tiny.write_dataset(tmp_path / "data")
    tiny.train_quietly(tiny.config(data, tmp_path / "run", max_steps=2, pipeline="stale"))
    one, odd = (Predictor(tmp_path / "run", mesh=MeshConfig(chips=chips)) for chips in (1, 3))
    assert odd.evaluate("test").log_loss == pytest.approx(one.evaluate("test").log_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("bset", "checkpoint is 'bset', but must be 'best', 'latest' or the step of one; there are [6]"),
        (None, "checkpoint is None, but must be"),
        (6.0, "checkpoint is 6.0, but must be"),
        (np.int64(7), "no checkpoint of step 7"),
    ],
)
def test_predictor_when_there_is_no_such_checkpoint_then_one_line_says_which_there_are(predictor, checkpoint, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Predictor(predictor._workdir.path, checkpoint=checkpoint)


def test_predictor_when_made_then_nothing_is_logged_and_the_folder_stays_as_it_is(predictor, caplog):
    folder = predictor._workdir.path
    before = sorted((path, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")])
    with caplog.at_level("WARNING"):
        logging.getLogger("absl").addHandler(caplog.handler)
        try:
            assert Predictor(folder, checkpoint=6).step == 6
        finally:
            logging.getLogger("absl").removeHandler(caplog.handler)
    assert caplog.messages == []
    assert sorted((path, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]) == before


def test_predictor_when_the_run_had_kernels_of_another_device_then_it_takes_those_of_this_one(predictor, tmp_path):
    folder = shutil.copytree(predictor._workdir.path, tmp_path / "run")
    path = folder / "config.json"
    body = json.loads(path.read_text())
    body["experiment"]["kernels"] = "mosaic_tpu"
    path.write_text(json.dumps(body))
    assert Predictor(folder).recommender.config.kernels is None
    with pytest.raises(InputError, match="implementation 'mosaic_tpu' is none for cpu; use cpu, xla, or None"):
        Predictor(folder, kernels="mosaic_tpu")


def test_checkpoint_when_it_is_damaged_then_the_error_of_prediction_names_no_removal_but_the_others(
    predictor, tmp_path
):
    folder = shutil.copytree(predictor._workdir.path, tmp_path / "run")
    (folder / "tables" / "6" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"not a complete folder .*; use another checkpoint: there is no other, so tr"):
        Predictor(folder)


@pytest.mark.parametrize(
    "progress", ["", "[]", "{}", '{"best_score": 1, "best_step": "six", "evaluations_since_best": 0}']
)
def test_checkpoint_when_its_progress_is_damaged_then_one_line_says_so(predictor, tmp_path, progress):
    folder = shutil.copytree(predictor._workdir.path, tmp_path / "run")
    (folder / "checkpoints" / "6" / "progress" / "metadata").write_text(progress)
    with pytest.raises(InputError, match=r"checkpoints/6: is damaged \(.*\); use another checkpoint: there is no"):
        Predictor(folder)


@pytest.fixture
def removing_step_6(predictor, tmp_path, monkeypatch):
    """A run with checkpoints of steps 4 and 6, of which the second is removed once its dense state has been read."""
    run_folder = shutil.copytree(predictor._workdir.path, tmp_path / "run")
    for part in ("checkpoints", "tables"):
        shutil.copytree(run_folder / part / "6", run_folder / part / "4")

    def restore(tables, folder):
        if folder.name == "6":
            shutil.rmtree(run_folder / "checkpoints" / "6")
            shutil.rmtree(folder)
        return restore_tables(tables, folder)

    monkeypatch.setattr("dlrm_jax.checkpoint.restore_tables", restore)
    return run_folder


def test_checkpoint_when_a_training_removes_it_while_it_is_read_then_the_newest_that_is_there_is_read(removing_step_6):
    assert Predictor(removing_step_6, checkpoint="latest").step == 4


def test_checkpoint_when_it_was_named_and_is_removed_while_it_is_read_then_one_line_says_so(removing_step_6):
    with pytest.raises(InputError, match=r"checkpoints/6: was removed while it was read, .* there are \[4\]$"):
        Predictor(removing_step_6, checkpoint=6)


def test_checkpoint_when_another_is_removed_while_they_are_listed_then_it_is_read_all_the_same(predictor, monkeypatch):
    def removed(_):
        raise FileNotFoundError("checkpoints/4")

    monkeypatch.setattr(ocp.path.step.Metadata, "commit_timestamp", property(removed))
    assert Predictor(predictor._workdir.path, checkpoint="latest").step == 6


def test_checkpoint_when_orbax_cannot_read_it_then_the_error_says_that_it_is_damaged(predictor, monkeypatch):
    def restore(*_, **__):
        raise Exception("Encountered error while reading array index")  # what orbax raises of a file cut short

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with pytest.raises(
        InputError, match=r"/6: is damaged \(Encountered error while reading array index\); use another"
    ):
        Predictor(predictor._workdir.path)


def test_checkpoint_when_a_read_of_it_has_failed_then_reads_that_end_later_print_nothing(predictor, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    hook = sys.unraisablehook
    Predictor(predictor._workdir.path)
    assert sys.unraisablehook is hook
    monkeypatch.setattr(ocp.CheckpointManager, "restore", lambda *_, **__: 1 // 0)
    for _ in range(2):
        with pytest.raises(InputError, match="is damaged"):
            Predictor(predictor._workdir.path)
    # As tensorstore's threads raise them where nobody can catch them.
    shown: Any = sys.unraisablehook
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "disk on fire"))
    shown(late)
    shown(other)
    assert printed == [other]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS.drop("item"), "samples: column 'item' of card.json is missing"),
        (changed(user=[0, tiny.USERS, 0]), "samples, row 1: 'user' is 40, but ids lie in [0, 40)"),
        (changed(user=[0, 0, -1]), "samples, row 2: 'user' is -1, but ids lie in [0, 40)"),
        (changed(user=[0, 2**31 + 5, 0]), "samples, row 1: 'user' is 2147483653, but ids lie in [0, 40)"),
        (changed(tags=[[1], [2, 60], []]), "samples, row 1: 'tags' holds 60, but ids lie in [0, 60)"),
        (changed(tags=[[1] * 31, [], []]), "samples, row 0: 'tags' has 31 ids, but max_pooling_factor is 30"),
        (changed(user=["a", "b", "c"]), "column 'user' is large_string, but must be an integer (int64)"),
        (changed(user=[0.0, 1.0, 2.0]), "column 'user' is double, but must be an integer (int64)"),
        (changed(age=[0.0, np.nan, 0.0]), "samples, row 1: 'age' is nan, but dense features are finite"),
        ({"user": [1, 2], "item": [1]}, "samples of type dict cannot be read"),
        ({"user": [2**70]}, "samples of type dict cannot be read"),
        (7, "samples of type int cannot be read"),
        (ROWS["age"], "samples of type Series cannot be read; give a polars or pandas DataFrame, a pyarrow Table"),
        (ROWS.lazy(), "samples of type LazyFrame cannot be read; give a polars or pandas DataFrame, a pyarrow Table"),
    ],
)
def test_rows_when_they_are_not_what_the_card_says_then_one_line_says_where(predictor, rows, message):
    with pytest.raises(InputError) as error:
        predictor.predict(rows)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_batch_when_an_id_is_outside_its_table_then_one_line_names_sample_feature_and_value(predictor):
    batch = predictor.batch(ROWS.to_arrow())
    items = batch.ids.features.index("item")
    values = batch.ids.values.copy()
    values[batch.ids.lengths[:items].sum() + 4] = tiny.ITEMS
    with pytest.raises(InputError, match=r"^sample 4: feature 'item' holds 100, but ids lie in \[0, 100\): repair"):
        predictor.predict(dataclasses.replace(batch, ids=dataclasses.replace(batch.ids, values=values)))
    wide = dataclasses.replace(batch.ids, values=batch.ids.values.astype(np.int64))
    with pytest.raises(InputError, match="int64"):
        predictor.predict(dataclasses.replace(batch, ids=wide))


def test_batch_when_its_predictions_would_be_no_numbers_then_one_line_names_the_sample(predictor):
    batch = predictor.batch(ROWS.to_arrow())
    tags = batch.ids.features.index("tags")
    lengths = batch.ids.lengths.copy()
    # The ids are as many as before, and all in their table.
    lengths[tags, 5], lengths[tags, 6] = tiny.MAX_TAGS + 1, lengths[tags, 5:7].sum() - tiny.MAX_TAGS - 1
    with pytest.raises(InputError, match=r"^sample 5: feature 'tags' has 31 ids, but max_pooling_factor is 30"):
        predictor.predict(dataclasses.replace(batch, ids=dataclasses.replace(batch.ids, lengths=lengths)))
    dense = batch.dense.copy()
    dense[7, 1] = np.nan
    with pytest.raises(InputError, match=r"^sample 7: 'price' is nan, but dense features are finite: repair"):
        predictor.predict(dataclasses.replace(batch, dense=dense))
    weights = np.ones(batch.ids.capacity, np.float32)
    weights[batch.ids.lengths.sum() :] = np.nan  # of no id
    weighted = dataclasses.replace(batch.ids, weights=weights)
    np.testing.assert_allclose(
        predictor.predict(dataclasses.replace(batch, ids=weighted)), predictor.predict(batch), rtol=1e-6
    )
    items = batch.ids.features.index("item")
    weights[batch.ids.lengths[:items].sum() + 8] = np.inf
    with pytest.raises(
        InputError, match=r"^sample 8: feature 'item' has the weight inf, but weights are finite: repair"
    ):
        predictor.predict(dataclasses.replace(batch, ids=weighted))


def test_eval_script_when_it_is_run_then_its_last_line_is_json_with_all_samples(predictor, monkeypatch, capsys):
    monkeypatch.setattr(eval_script, "configure_jax", lambda mesh: None)

    def evaluate(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scripts/eval.py", *map(str, arguments)])
        code = 0
        try:
            run(eval_script.main)
        except SystemExit as stop:
            code = int(str(stop.code))
        return code, *capsys.readouterr()

    folder = predictor._workdir.path
    code, out, err = evaluate(folder, "--split", "test")
    assert f"100% {len(ROWS)} rows" in err  # of the progress bar
    figures = json.loads(out.splitlines()[-1])
    assert code == 0
    assert figures["split"] == "test"
    assert figures["num_samples"] == len(ROWS)
    assert figures["step"] == predictor.step
    assert figures["auc"] == predictor.evaluate("test").auc
    for arguments, message in (
        ((folder, "--split", "tset"), "no split 'tset'; use one of ['test', 'train', 'validation']"),
        ((folder, "--splitt", "test"), "there is no flag '--splitt'; did you mean '--split'?"),
        ((folder, "--checkpoint", "77"), "no checkpoint of step 77"),
        ((folder.parent / "data",), "is not the folder of a run"),
        ((), "PATH"),
    ):
        code, out, err = evaluate(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_id_when_it_is_negative_then_more_rows_are_not_advised(predictor):
    with pytest.raises(InputError, match=r"'user' is -1, but ids lie in \[0, 40\): repair the id$"):
        predictor.predict(changed(user=[0, 0, -1]))


@pytest.mark.parametrize(
    ("rows", "ending"),
    [
        (changed(user=[0, tiny.USERS, 0]), "but ids lie in [0, 40): repair the id"),
        (changed(tags=[[1], [2, tiny.TAGS], []]), "but ids lie in [0, 60): repair the id"),
        (changed(tags=[[1] * (tiny.MAX_TAGS + 1), [], []]), "max_pooling_factor is 30: shorten the bag"),
        (ROWS.select("user", "item", "tags", "age"), "is missing: give it; the samples have ['user', 'item', 'tags', "),
    ],
)
def test_rows_when_a_trained_model_cannot_take_them_then_another_card_is_not_advised(predictor, rows, ending):
    with pytest.raises(InputError) as error:
        predictor.predict(rows)
    assert ending in str(error.value)
    assert str(error.value).endswith(ending) or "missing" in ending


def test_eval_script_when_other_samples_are_given_then_what_is_attainable_is_said_of_them(
    predictor, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(eval_script, "configure_jax", lambda mesh: None)
    other = tiny.write_dataset(tmp_path / "other", attainable={"test": {"auc": 0.87654}})
    for arguments, expected in ((["--data", str(other)], True), ([], False)):
        eval_script.main([str(predictor._workdir.path), *arguments])
        assert ("0.87654" in capsys.readouterr().err) == expected
