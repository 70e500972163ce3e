"""README.md and docs/*.md: what they tell a person to type works, and what they point at is there."""

import contextlib
import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import dlrm_jax.data.check
import dlrm_jax.data.criteo
import dlrm_jax.data.kuairand
import dlrm_jax.data.synthetic
import dlrm_jax.distributed
import dlrm_jax.loop
import dlrm_jax.planning
import dlrm_jax.predict
import scripts.command_line
from configs import CONFIGS
from configs.quickstart import quickstart
from dlrm_jax.config import Config, make_specs
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.data.synthetic import SyntheticSpec, prepare_synthetic
from dlrm_jax.loop import train
from sharding import ShardedTables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = ".venv/bin/python"


def code_blocks(text: str) -> list[str]:
    """Fenced blocks without their fences, and blocks indented by four spaces."""
    fenced = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n)+", fenced.sub("", text), re.MULTILINE)
    return fenced.findall(text) + indented


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> list[list[str]]:
    """The commands of all code blocks, as words."""
    lines = [line.strip() for block in code_blocks(text) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(rf"(make|{re.escape(PYTHON)}) ", line)]


def documented_commands() -> list[list[str]]:
    """The commands of all pages and of the configs' docstrings, each once."""
    texts = [page.read_text() for page in PAGES]
    texts += [(sys.modules[config.__module__].__doc__ or "") + "\n" for config in CONFIGS.values()]
    commands = [tuple(words) for text in texts for words in commands_of(text)]
    # Placeholders, and the config that docs/training.md writes.
    others = {"CONFIG", "FILES...", "FOLDER", "FOLDER_OF_CSV_FILES", "DIR", "mine"}
    return [list(words) for words in dict.fromkeys(commands) if not others & set(words)]


def script_commands() -> list[list[str]]:
    return [words[1:] for words in documented_commands() if words[0] == PYTHON]


class ParsedError(Exception):
    """The command line was parsed, and the work would begin."""


@pytest.fixture
def parse(monkeypatch, tmp_path, capsys):
    """Runs a script up to where its work would begin; returns what the work would be given."""

    def begin(*arguments: object, **settings: object) -> None:
        raise ParsedError(arguments, settings)

    for module, name in (
        (dlrm_jax.loop, "train"),
        (dlrm_jax.predict, "Predictor"),
        (dlrm_jax.data.check, "check_dataset"),
        (dlrm_jax.data.criteo, "prepare_criteo"),
        (dlrm_jax.data.kuairand, "prepare_kuairand"),
        (dlrm_jax.data.synthetic, "prepare_synthetic"),
        (dlrm_jax.planning, "make_plan"),
    ):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(scripts.command_line, "configure_jax", lambda *_: None)
    # JAX finds other processes only before it is first used.
    monkeypatch.setattr(dlrm_jax.distributed, "join", lambda *_: 1)
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> tuple[object, ...]:
        monkeypatch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except ParsedError as parsed:
            return parsed.args[0]
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
        return ()

    return run


def test_readme_names_the_two_commands_first():
    assert [words[:2] for words in commands_of((ROOT / "README.md").read_text())[:2]] == [
        ["make", "train"],
        ["make", "test"],
    ]


def test_every_make_target_that_is_documented_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in documented_commands() if words[0] == "make"}
    for page in PAGES:
        named |= set(re.findall(r"`(?:\w+=\w+ )?make ([a-z-]+)`", page.read_text()))
    assert {"train", "test", "docs"} <= named
    assert named <= targets


@pytest.mark.parametrize("words", script_commands(), ids=shlex.join)
def test_every_documented_command_line_is_accepted_by_its_script(words, parse):
    parse(words)


def test_documented_commands_cover_every_script_and_config():
    commands = script_commands()
    assert {words[0] for words in commands} >= {"scripts/train.py", "scripts/eval.py", "scripts/prepare.py"}
    assert {words[1] for words in commands if words[0] == "scripts/train.py"} >= set(CONFIGS)
    assert {words[1] for words in commands if words[0] == "scripts/prepare.py"} == {
        *("criteo", "kuairand", "synthetic", "check")
    }


def test_flags_of_a_documented_command_reach_the_config(parse):
    words = ["scripts/train.py", "kuairand", "--data.path", "data/kuairand", "--workdir", "runs/kuairand"]
    (config,) = parse(words)
    assert (config.data.path, config.workdir) == ("data/kuairand", "runs/kuairand")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_lead_to_files(page):
    targets = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", page.read_text())
    relative = [target.partition("#")[0] for target in targets if "://" not in target]
    missing = {target for target in relative if target and not (page.parent / target).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    folders = "|".join(("dlrm_jax", "sharding", "pallas_kernels", "configs", "scripts", "benchmarks", "docs", "tests"))
    named = set(re.findall(rf"\b((?:{folders})/[\w/]+\.(?:py|md|ipynb|json))\b", page.read_text()))
    own = {"configs/mine.py"}
    assert {path for path in named - own if not (ROOT / path).exists()} == set()


def test_the_file_tree_of_the_architecture_names_exactly_the_files_that_there_are():
    rooms = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2]
    (tree,) = code_blocks(rooms)[:1]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    folders = [ROOT / name for name in ("dlrm_jax", "dlrm_jax/data", "sharding", "pallas_kernels", "scripts")]
    there = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py"}
    assert named - {"stated.py", "skewed.py"} == there


def test_the_readme_trains_tables_alone_as_it_says_and_compiles_its_step_once(monkeypatch):
    (example,) = (block for block in python_blocks("README.md") if "ShardedTables" in block)
    traced = []
    lookup = ShardedTables.lookup
    monkeypatch.setattr(ShardedTables, "lookup", lambda *given: traced.append(given) or lookup(*given))
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(None):
        exec(compile(example, "README.md", "exec"), names)
    assert len({sum(len(bag) for bags in batch.values() for bag in bags) for batch, _ in names["batches"]}) == 2
    assert len(traced) == 1
    assert float(names["loss"]) < 0.1


def test_the_config_that_the_docs_write_fits_the_dataset_that_they_make(parse, monkeypatch):
    (example,) = (block for block in python_blocks("docs/training.md") if "def mine" in block)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(example, "docs/training.md", "exec"), names)
    monkeypatch.setitem(CONFIGS, "mine", names["mine"])
    (config,) = parse(["scripts/train.py", "mine"])
    assert isinstance(config, Config)
    card = DatasetCard(
        name="mine",
        dense=(DenseColumn(name="price"),),
        sparse=(
            SparseColumn(name="country", num_rows=5),
            SparseColumn(name="viewed", num_rows=1000, bag=True, max_pooling_factor=5),
        ),
        splits={"train": SplitSummary(num_samples=32_000, positive_rate=0.2)},
    )
    tables, features = make_specs(config.embedding, card)
    assert {table.name: table.dim for table in tables} == {"country": 8, "viewed": 16}
    assert {feature.name: feature.pooling for feature in features} == {"country": "sum", "viewed": "mean"}


def test_the_readme_predicts_with_a_trained_model_as_it_says(tmp_path, monkeypatch):
    spec = SyntheticSpec(num_train=2048, num_validation=512, num_test=512, single_rows=(10, 20), bag_rows=(30,))
    monkeypatch.chdir(tmp_path)
    prepare_synthetic("data/synthetic", config=spec)
    config = quickstart()
    data = dataclasses.replace(config.data, batch_size=256, eval_batch_size=512)
    train(dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, max_steps=2)))
    (example,) = (block for block in python_blocks("README.md") if "Predictor" in block)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    probabilities = names["probabilities"]
    assert len(probabilities) == 512
    assert ((probabilities > 0) & (probabilities < 1)).all()
