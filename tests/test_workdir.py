"""Workdirs hold on to what must not change while a run goes on."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from test_config import CARD, replaced

from dlrm_jax.data.card import DenseColumn, SparseColumn
from dlrm_jax.workdir import Workdir
from sharding import InputError


@pytest.fixture
def claimed(tmp_path):
    """A config, and its workdir with a checkpoint."""
    config = tiny.config(tmp_path / "data", tmp_path / "run")
    Workdir(config.workdir).claim(config, CARD)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    return config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1, "seed = 0, but now it is 1"),
        ("data.batch_size", 128, "data.batch_size = 64, but now it is 128"),
        ("data.shuffle_window", 512, "data.shuffle_window = 256, but now it is 512"),
        ("data.virtual_shards", 8, "data.virtual_shards = 4, but now it is 8"),
        ("model.top_mlp", (16, 1), "model.top_mlp = [8, 1], but now it is [16, 1]"),
        ("dense_optimizer.name", "sgd", 'dense_optimizer.name = "adam", but now it is "sgd"'),
        ("embedding.default.learning_rate", 0.5, "embedding.default.learning_rate = 0.05, but now it is 0.5"),
        ("embedding.tables", {}, "embedding.tables.item.beta1 = 0.9, but now it is not there"),
        ("schedule.warmup_steps", 7, "schedule.warmup_steps = 6, but now it is 7"),
        ("exchange.forward", "int8", 'exchange.forward = "float32", but now it is "int8"'),
        ("exchange.backward", "bfloat16", 'exchange.backward = "float32", but now it is "bfloat16"'),
        ("dense_optimizer.clip_norm", None, "dense_optimizer.clip_norm = 1.0, but now it is None"),
        ("train.best_by", "auc", 'train.best_by = "ne", but now it is "auc"'),
        ("train.pipeline", "stale", 'train.pipeline = "route", but now it is "stale"'),
    ],
)
def test_workdir_when_the_experiment_is_another_then_it_refuses_naming_the_field_and_writes_nothing(
    claimed, field, value, message
):
    path = Path(claimed.workdir, "config.json")
    before = path.read_bytes()
    with pytest.raises(InputError) as error:
        Workdir(claimed.workdir).claim(replaced(claimed, field, value), CARD)
    assert f"holds a run with {message}: choose another --workdir, or restore the setting" in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, 'dataset name = "tiny", but now it is "other"'),
        ({"splits": {"train": tiny.card().splits["train"]}}, "dataset splits.test ="),
        (
            {"sparse": (SparseColumn(name="user", num_rows=41), *CARD.sparse[1:])},
            "dataset sparse.user.num_rows = 40, but now it is 41",
        ),
        (
            {"sparse": (dataclasses.replace(CARD.sparse[0], vocabulary_digest="22"), *CARD.sparse[1:])},
            'dataset sparse.user.vocabulary_digest = "11", but now it is "22"',
        ),
        ({"dense": CARD.dense[::-1]}, 'dataset dense[0] = "age", but now it is "price"'),
        (
            {"dense": (DenseColumn(name="age", std=2.0), CARD.dense[1])},
            "dataset dense.age.std = 1.0, but now it is 2.0",
        ),
        ({"sparse": CARD.sparse[::-1]}, 'dataset sparse[0] = "user", but now it is "tags"'),
        (
            {"sparse": (*CARD.sparse[:2], dataclasses.replace(CARD.sparse[2], max_pooling_factor=31))},
            "dataset sparse.tags.max_pooling_factor = 30",
        ),
    ],
)
def test_workdir_when_the_dataset_is_another_then_it_refuses_naming_the_field(claimed, changes, message):
    with pytest.raises(InputError, match="holds a run with dataset") as error:
        Workdir(claimed.workdir).claim(claimed, tiny.card(**changes))
    assert message in str(error.value)


def test_workdir_when_the_row_groups_are_others_then_it_refuses_naming_both(tmp_path):
    config = tiny.config(tmp_path / "data", tmp_path / "run")
    workdir = Workdir(config.workdir)
    workdir.claim(config, CARD, row_groups="old")
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    workdir.claim(config, CARD, row_groups="old")
    with pytest.raises(InputError, match=r"row groups of digest old, but now it is new, .* restore the files"):
        workdir.claim(config, CARD, row_groups="new")


def test_workdir_when_its_run_is_of_an_earlier_version_then_its_row_groups_are_unknown_and_its_card_is_known(claimed):
    path = Path(claimed.workdir, "config.json")
    body = json.loads(path.read_text())
    del body["row_groups"]
    path.write_text(json.dumps(body | {"card": {"name": "tiny"}}))
    with pytest.raises(InputError, match=r"dataset dense\[0\]"):
        Workdir(claimed.workdir).claim(claimed, tiny.card(dense=CARD.dense[::-1]), row_groups="any")
    Workdir(claimed.workdir).claim(claimed, CARD, row_groups="any")
    with pytest.raises(InputError, match="digest any, but now it is other"):
        Workdir(claimed.workdir).claim(claimed, CARD, row_groups="other")


def test_workdir_when_only_what_may_change_has_changed_then_it_remembers_the_new_settings(claimed, tmp_path):
    moved = tiny.with_train(claimed, epochs=9, log_every=1, keep_checkpoints=7)
    moved = replaced(replaced(moved, "data.path", str(tmp_path / "elsewhere")), "data.threads", 1)
    Workdir(claimed.workdir).claim(moved, tiny.card(attainable={"test": {"auc": 0.9}}, source={"by": "hand"}))
    assert Workdir(claimed.workdir).read()[0] == moved


def test_workdir_when_its_run_has_no_checkpoint_yet_then_another_may_have_it(tmp_path):
    config = tiny.config(tmp_path / "data", tmp_path / "run")
    Workdir(config.workdir).claim(config, CARD)
    (tmp_path / "run" / "config.json.partial").write_text("{")  # of a kill
    other = replaced(config, "seed", 5)
    Workdir(config.workdir).claim(other, CARD)
    assert Workdir(config.workdir).read() == (other, CARD)


def test_workdir_when_a_kill_left_only_the_beginning_of_its_config_then_it_is_taken(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    Workdir(tmp_path).claim(tiny.config(None, tmp_path), CARD)


def test_workdir_when_the_folder_holds_something_else_then_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty, and not the folder of a run; choose another --workdir"):
        Workdir(tmp_path).claim(tiny.config(None, tmp_path), CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_workdir_when_it_cannot_be_made_then_the_error_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written \(Not a directory\)"):
        Workdir(tmp_path / "file" / "run").claim(tiny.config(None, tmp_path), CARD)


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", '{"experiment": {}}', json.dumps({"experiment": {"name": 5}, "dataset": {}})]
)
def test_workdir_when_its_config_is_damaged_then_reading_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: (cannot be read|written by another version)"):
        Workdir(tmp_path).read()
