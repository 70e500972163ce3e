"""scripts/train.py: its flags, and one line for each thing that it cannot use."""

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import kill9
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import tiny

from configs import CONFIGS
from dlrm_jax.data.card import DenseColumn, SparseColumn, write_card
from dlrm_jax.data.folder_lock import exclusive
from dlrm_jax.loop import TrainingError
from dlrm_jax.save_errors import SaveError
from scripts import train as train_script
from scripts.command_line import parse_config
from scripts.one_line_errors import run
from sharding import InputError


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs the script in this process; returns its exit code and the lines of stderr that begin with `error:`."""
    monkeypatch.setattr(train_script, "configure_jax", lambda mesh: None)
    monkeypatch.setattr(train_script, "join", lambda processes: 1)

    def script(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *map(str, arguments)])
        code = 0
        try:
            with jax.numpy_dtype_promotion("standard"):  # optax's Adam
                run(train_script.main, TrainingError, SaveError)
        except SystemExit as stop:
            code = int(str(stop.code))
        lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        return code, [line for line in lines if not code or line.startswith("error:")]

    return script


def test_script_when_it_joins_other_processes_then_jax_leaves_sigterm_alone(monkeypatch):
    def join(processes):
        raise InputError(f"JAX takes it: {jax.config.jax_enable_preemption_service}")

    monkeypatch.setattr(train_script, "join", join)
    with pytest.raises(InputError, match="JAX takes it: False"):
        train_script.main(["quickstart"])


def flags(data: Path, workdir: Path, *more: object) -> list[str]:
    """One window a epoch, so that all rows are read before the first step."""
    arguments = kill9.flags(data, workdir, epochs=1, checkpoint_every=1)
    return kill9.last_of_each([*arguments, "--data.shuffle_window", 2048, "--train.max_steps", 2, *more])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    tiny.train_quietly(parse_config(flags(data, workdir), ""))
    return workdir


def leaves_of(value: object, prefix: str) -> list[str]:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return [leaf for f in fields for leaf in leaves_of(getattr(value, f.name), f"{prefix}.{f.name}")]
    return [prefix.removeprefix(".")]


def test_help_when_asked_of_a_config_then_every_field_is_there_with_its_text(train, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # a wider terminal has several columns of flags
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "quickstart", "--help"])
    with pytest.raises(SystemExit) as stop:
        train_script.main(["quickstart", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.partition("options")[2].split())
    # Whole tables by name, and the card, are values of a config's file.
    expected = set(leaves_of(dataclasses.replace(CONFIGS["quickstart"](), stated=None), ""))
    expected -= {"embedding.tables", "stated"}
    assert len(expected) > 50
    for name in expected:
        _, *after = re.split(rf"--{re.escape(name)}[ ,]", text, maxsplit=1)
        assert after, name
        kind_and_text, default, _ = after[0].partition("(default:")
        assert len(kind_and_text.split()) > 1, name
        assert default, name


def test_help_when_asked_without_a_config_then_all_configs_are_listed(train, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        train_script.main([])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CONFIGS)
    assert "--field.subfield" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstat"], "no config 'quickstat'; did you mean 'quickstart'?; there are quickstart, kuairand"),
        (["quickstart", "--train.epoch", "2"], "no flag '--train.epoch'; did you mean '--train.epochs'?"),
        (["quickstart", "--batch_size=64"], "no flag '--batch_size'; did you mean '--data.batch_size'?"),
        (["quickstart", "--data.batch_size", "many"], "--data.batch_size: invalid literal for int()"),
        (["quickstart", "--train.epochs"], "Missing value for argument '--train.epochs'"),
        (["quickstart", "--train.best_by", "f1"], "invalid choice 'f1' for argument '--train.best_by'"),
        (
            ["quickstart", "--embedding.pooling", "id_0", "mean", "bag_0", "median", "--seed", "1"],
            "--embedding.pooling id_0 mean bag_0 median: --embedding.pooling takes pairs of a name and one of sum, m",
        ),
        (["quickstart", "--embedding.shared", "t"], "--embedding.shared: table 't' has no features, but takes"),
        (["quickstart", "--kernels", "mosaic"], "argument '--kernels'. Expected one of ('None', 'cpu', 'mosa"),
        (["quickstart", "--data.batch_size", "100"], "data.batch_size is 100, which data.virtual_shards 64 does not"),
        (["quickstart", "--data.path", "/nowhere"], "/nowhere/card.json: no dataset card there"),
        (["quickstart", "--data.path", "None"], "config 'quickstart' needs a dataset"),
        (["kuairand", "--train.eval_split", "x", "--data.path", "/nowhere"], "/nowhere/card.json"),
    ],
)
def test_command_line_when_it_is_wrong_then_one_line_says_so_and_nothing_is_written(
    train, tmp_path, arguments, message
):
    more = ["--workdir", str(tmp_path / "run")] if len(arguments) > 1 else []
    code, lines = train(*arguments[:1], *more, *arguments[1:])
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def with_value(column: str, row: int, value: object):
    """Changes one value of a column."""

    def change(table: pl.DataFrame) -> pl.DataFrame:
        values = table[column].to_list()
        values[row] = value
        return table.with_columns(pl.Series(column, values, dtype=table[column].dtype))

    return change


ROWS = {
    "an id beyond its table": (
        {"change": with_value("user", 7, 40)},
        "train/part-00000.parquet, row 7: 'user' is 40, but ids lie in [0, 40): repair the id, or raise num_rows",
    ),
    "an id beyond 2^31": (
        {"change": with_value("item", 1100, 2**32 + 1)},
        "train/part-00000.parquet, row 1100: 'item' is 4294967297, but ids lie in [0, 100)",
    ),
    "a negative id in a bag": (
        {"change": with_value("tags", 5, [1, -3])},
        "train/part-00000.parquet, row 5: 'tags' holds -3, but ids lie in [0, 60)",
    ),
    "a dense feature that is not a number": (
        {"change": with_value("price", 60, float("nan"))},
        "train/part-00000.parquet, row 60: 'price' is nan, but dense features are finite float32 numbers",
    ),
    "a label of 2": (
        {"change": with_value("label", 3, 2.0)},
        "train/part-00000.parquet, row 3: 'label' is 2.0, but labels lie in [0, 1]",
    ),
    "fewer weights than ids": (
        {
            "change": lambda table: table.with_columns(w=pl.col("tags").list.head(1)),
            "sparse": (SparseColumn(name="tags", num_rows=60, bag=True, max_pooling_factor=30, weights="w"),),
        },
        "'w' has 1 weights, but 'tags' has",
    ),
}
FILES = {
    "a bag of more ids than the card says": (
        {"sparse": (SparseColumn(name="tags", num_rows=60, bag=True, max_pooling_factor=5),)},
        "ids, but max_pooling_factor is 5",
    ),
    "a column of another type": (
        {"change": lambda table: table.with_columns(pl.col("user").cast(pl.String))},
        "part-00000.parquet: column 'user' is large_string, but must be an integer (int64): cast it, or number its",
    ),
    "a column that is missing": (
        {"change": lambda table: table.drop("price")},
        "train/part-00000.parquet: column 'price' of card.json is missing",
    ),
    "another number of rows": (
        {"change": lambda table: table[:-1]},
        "train: its files hold 1199 rows, but the card says 1200",
    ),
    "no rows": ({"change": lambda table: table[:0]}, "train: its files hold no rows"),
}


@pytest.mark.parametrize("case", [*ROWS, *FILES])
def test_data_when_it_is_bad_then_one_line_names_file_and_row_and_there_is_no_checkpoint(train, tmp_path, case):
    changes, message = (ROWS | FILES)[case]
    data = tiny.write_dataset(tmp_path / "data", **changes)
    code, lines = train(*flags(data, tmp_path / "run", "--train.eval_split", "None"))
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert kill9.committed(tmp_path / "run") == set()
    if case in FILES and "bag" not in case:  # found before anything begins
        assert not (tmp_path / "run").exists()


def test_data_when_it_is_repaired_as_the_error_says_then_the_same_command_trains(train, tmp_path):
    data = tiny.write_dataset(tmp_path / "data", change=with_value("user", 7, 40))
    assert train(*flags(data, tmp_path / "run"))[0] == 2
    columns = {column.name: column for column in tiny.card().sparse}
    columns["user"] = dataclasses.replace(columns["user"], num_rows=41)
    write_card(tiny.card(sparse=tuple(columns.values())), data)
    assert train(*flags(data, tmp_path / "run"))[0] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: shutil.rmtree(data / "train"), "train: holds no .parquet file, but the card names the split"),
        (lambda data: (data / "train" / "part-00000.parquet").write_bytes(b"PAR1 no"), "cannot be read as Parquet"),
        (lambda data: (data / "card.json").write_text("{"), "card.json: cannot be read as JSON"),
        (lambda data: write_card(tiny.card(splits={"train": tiny.card().splits["train"]}), data), "['train']: make"),
        (lambda data: write_card(tiny.card(dense=(DenseColumn(name="age", std=0.0),)), data), "has std 0.0"),
    ],
    ids=["missing folder", "unreadable file", "unreadable card", "missing split", "card out of its limits"],
)
def test_files_when_they_are_missing_or_unreadable_then_one_line_names_them_and_nothing_is_written(
    train, data, tmp_path, spoil, message
):
    copy = shutil.copytree(data, tmp_path / "data")
    spoil(copy)
    code, lines = train(*flags(copy, tmp_path / "run"))
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_file_when_a_part_of_it_is_damaged_then_one_line_names_it(train, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    path = copy / "train" / "part-00000.parquet"
    footer = len(path.read_bytes()) - pq.read_metadata(path).serialized_size - 8
    path.write_bytes(bytes(np.full(footer - 4, 255, np.uint8)).join([b"PAR1", path.read_bytes()[footer:]]))
    code, lines = train(*flags(copy, tmp_path / "run"))
    assert code == 2
    assert len(lines) == 1
    assert "part-00000.parquet: row group" in lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", 1], "seed = 0, but now it is 1"),
        (["--model.top_mlp", 9, 1], "model.top_mlp = [8, 1], but now it is [9, 1]"),
        (["--dense_optimizer.name", "sgd"], 'dense_optimizer.name = "adam", but now it is "sgd"'),
        (["--data.batch_size", 128], "data.batch_size = 64, but now it is 128"),
    ],
)
def test_workdir_when_its_run_is_another_then_one_line_names_the_field(train, data, trained, more, message):
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    code, lines = train(*flags(data, trained, *more))
    assert code == 2
    assert len(lines) == 1
    assert f"{trained}: holds a run with {message}" in lines[0]
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def shape_of_another_model(workdir: Path) -> None:
    """Makes the config say that the checkpoint beside it is of a wider model."""
    path = workdir / "config.json"
    body = json.loads(path.read_text())
    for part in (body["config"], body["experiment"]):
        target = part if "model.top_mlp" in part else part["model"]
        target["model.top_mlp" if target is part else "top_mlp"] = [16, 1]
    path.write_text(json.dumps(body))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def chunk_of(workdir: Path) -> Path:
    return next((workdir / "tables" / "2").glob("weights.*/c/0/0/0"))


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (lambda run: flip_a_byte(chunk_of(run)), [], "is damaged (DATA_LOSS"),
        (lambda run: chunk_of(run).unlink(), [], "); use another checkpoint: remove "),
        (lambda run: chunk_of(run).write_bytes(b"x"), [], "is damaged ("),
        (lambda run: (run / "tables/2/manifest.json").unlink(), [], "manifest.json: not a complete folder of tables"),
        (lambda run: (run / "tables/2/manifest.json").write_text("[]"), [], 'no "stores" and "tables" in it'),
        (lambda run: (run / "checkpoints/2/dense/_METADATA").write_text("{"), [], "checkpoints/2: is damaged ("),
        (
            shape_of_another_model,
            ["--model.top_mlp", 16, 1],
            "top.layers.0.bias.value is float32 of shape [8], but float32 of shape [16] in the model; use the",
        ),
        (lambda run: (run / "config.json").write_text("{"), [], "config.json: cannot be read"),
    ],
    ids=[
        "flipped chunk",
        "missing chunk",
        "cut chunk",
        "missing manifest",
        "wrong manifest",
        "cut dense state",
        "checkpoint of another model",
        "cut config",
    ],
)
def test_checkpoint_when_it_is_damaged_or_anothers_then_one_line_names_it(
    train, data, trained, tmp_path, spoil, more, message
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    spoil(workdir)
    code, lines = train(*flags(data, workdir, "--train.max_steps", 3, *more))
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    # The checkpoint before is whole.
    if "checkpoint" in message or "manifest" in message:
        folder = workdir / "checkpoints" / "2"
        assert lines[0].endswith(f"; use another checkpoint: remove {folder} to go on from step 1")
        shutil.rmtree(folder)
        assert train(*flags(data, workdir, "--train.max_steps", 3))[0] == 0


def test_loss_when_it_is_not_finite_then_the_script_exits_1_with_one_line_that_names_the_step(train, data, tmp_path):
    code, lines = train(*flags(data, tmp_path / "run", "--dense_optimizer.learning_rate", 1e30))
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: step 2: loss or a gradient is not finite")
    assert "the checkpoint of step 1 is intact" in lines[0]


def test_workdir_when_another_process_trains_there_then_one_line_names_it_and_nothing_changes(train, data, trained):
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    with exclusive(trained, what="training", instead="another --workdir"):
        code, lines = train(*flags(data, trained))
    assert code == 2
    assert len(lines) == 1
    assert f"{trained}: another process is training there" in lines[0]
    assert lines[0].endswith("give another --workdir")
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_kernels_when_they_are_for_other_devices_then_one_line_says_so_and_nothing_is_written(train, data, tmp_path):
    code, lines = train(*flags(data, tmp_path / "run", "--kernels", "mosaic_tpu"))
    assert (code, lines) == (2, ["error: kernels: implementation 'mosaic_tpu' is none for cpu; use cpu, xla, or None"])
    assert not (tmp_path / "run").exists()


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["metrics", "checkpoint"])
def test_disk_when_it_is_full_then_the_script_exits_1_with_one_line_that_says_where_it_goes_on(
    train, data, trained, tmp_path, monkeypatch, at
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    if at == "metrics":
        (workdir / "metrics.jsonl.partial").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, "posix_fallocate", full_disk)
    code, lines = train(*flags(data, workdir, "--train.max_steps", 3))
    assert code == 1
    assert lines == [
        f"error: {workdir}: the disk is full (No space left on device); make room there, and the same command goes on "
        "from step 2"
    ]
    assert kill9.committed(workdir) == {1, 2}


def test_initial_values_when_their_file_is_missing_then_one_line_names_it_and_another_file_may_follow(
    train, data, tmp_path
):
    code, lines = train(*flags(data, tmp_path / "run", "--embedding.default.initial_values", tmp_path / "none.npy"))
    assert code == 2
    assert f"{tmp_path / 'none.npy'}: initial values of table 'user' cannot be read" in lines[0]
    assert train(*flags(data, tmp_path / "run"))[0] == 0
