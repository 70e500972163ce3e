"""scripts/command_line.py and one_line_errors.py: repeated flags, flags that are not, devices, and unread output."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import CONFIGS
from scripts.command_line import configure_jax, parse_config, parse_with_config, take_processes
from scripts.one_line_errors import run
from scripts.plan import Arguments
from sharding.errors import InputError

ROOT = Path(__file__).parents[1]
TRAIN = (sys.executable, ROOT / "scripts" / "train.py")


def parse(*flags: str):
    return parse_config(["quickstart", *flags], "")


def test_dictionary_when_its_flag_is_repeated_then_all_entries_count():
    pooling = ["--embedding.pooling", "bag_0", "mean"]
    more = ["--seed", "3", "--embedding.pooling=bag_1", "mean", "bag_2", "sum", "--model.top_mlp", "8", "1"]
    config = parse(*pooling, *more)
    assert config.embedding.pooling == {"bag_0": "mean", "bag_1": "mean", "bag_2": "sum"}
    assert (config.seed, config.model.top_mlp) == (3, (8, 1))
    with pytest.raises(InputError, match=r"--embedding.pooling bag_0 mean bag_1 median: --embedding.pooling takes"):
        parse(*pooling, "--embedding.pooling", "bag_1", "median")


@pytest.mark.parametrize(
    "between", [(), ("--embedding.pooling",), ("bag_1", "mean"), ("--seed", "3", "--embedding.pooling")]
)
def test_pooling_when_it_is_given_twice_for_a_feature_then_the_error_names_it(between):
    with pytest.raises(InputError, match="'bag_0' twice, the second time as 'sum': keep one"):
        parse("--embedding.pooling", "bag_0", "mean", *between, "bag_0", "sum")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed 1 --seed 2", "--seed is given twice, as '--seed 1' and as '--seed 2': keep one"),
        ("--seed=1 --seed 1", "--seed is given twice, as '--seed=1' and as '--seed 1'"),
        ("--train.max-steps 1 --train.max_steps 2", "--train.max_steps is given twice, as '--train.max-steps 1' and"),
        ("--model.top_mlp 8 1 --model.top_mlp 1", "as '--model.top_mlp 8 1' and as '--model.top_mlp 1'"),
        (
            "--embedding.default.frozen --embedding.default.no_frozen",
            "--embedding.default.frozen is given twice, as '--embedding.default.frozen' and as '--embedding.default.no",
        ),
    ],
)
def test_flag_when_it_is_given_twice_then_the_error_names_both(flags, message):
    for read in (lambda words: parse(*words), take_processes):
        with pytest.raises(InputError, match=re.escape(message)):
            read(flags.split())


def test_flag_when_it_is_of_a_field_that_is_none_then_it_is_not_what_the_error_suggests():
    with pytest.raises(InputError, match=r"there is no flag '--stated'(; did you mean '--(?!stated)|; --help)"):
        parse("--stated", "x")


def test_flags_of_processes_when_given_twice_then_the_error_names_both():
    with pytest.raises(InputError, match="--process_id is given twice, as '--process_id 1' and as '--process_id 2'"):
        take_processes(["quickstart", "--process_id", "1", "--process_id", "2"])


def test_constraints_when_they_are_repeated_then_all_count():
    pins = ["--pin", "a=row_wise", "--pin", "b=node:1"]
    assert parse_with_config(Arguments, ["quickstart", *pins], "").pin == ("a=row_wise", "b=node:1")


def test_shared_tables_when_each_has_a_flag_then_all_count():
    first = ["--embedding.shared", "a", "id_0", "id_1"]
    config = parse(*first, "--seed", "3", "--embedding.shared", "b", "id_2", "id_3", "id_4")
    assert config.embedding.shared == {"a": ("id_0", "id_1"), "b": ("id_2", "id_3", "id_4")}
    assert parse(*first).embedding.shared == {"a": ("id_0", "id_1")}
    with pytest.raises(InputError, match="table 'a' is given twice: name all its features at once"):
        parse(*first, *first)


def test_shared_tables_when_the_config_has_some_then_each_has_a_flag_of_its_own():
    config = parse_config(["kuairand", "--embedding.shared.tag", "tag", "--seed", "3"], "")
    assert config.embedding.shared == {**CONFIGS["kuairand"]().embedding.shared, "tag": ("tag",)}
    with pytest.raises(InputError, match=r"no flag '--embedding.shared'; did you mean '--embedding.shared.video_id', "):
        parse_config(["kuairand", "--embedding.shared", "a", "tag"], "")


def test_help_when_asked_for_then_it_names_the_flags_of_processes_and_the_form_of_shared_tables(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--embedding.shared TABLE FEATURE [FEATURE ...]" in capsys.readouterr().out
    text = subprocess.run([*TRAIN, "quickstart", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(flag in text for flag in ("--coordinator", "--num_processes", "--process_id"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mesh", "no flag '--mesh'; did you mean '--mesh.nodes', '--mesh.chips'?; --help lists all flags"),
        ("--train", "'--train.checkpoint_every', ...?; --help"),
    ],
)
def test_flag_when_it_is_a_group_of_flags_then_the_error_names_them(flag, message):
    with pytest.raises(InputError) as refused:
        parse(flag, "2x4")
    assert message in str(refused.value)


def test_bottom_mlp_when_given_without_values_then_it_is_empty():
    assert parse("--model.bottom_mlp", "--seed", "3").model.bottom_mlp == ()


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (AssertionError(), "no such device"),
        (RuntimeError("Unable to initialize 'x':\nnone. (set JAX_PLATFORMS='' to)"), "Unable to initialize 'x': none."),
    ],
)
def test_platform_when_jax_cannot_use_it_then_one_line_names_the_variable(monkeypatch, raised, reason):
    def fail():
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("scripts.command_line.jax.config.update", lambda *_: None)
    monkeypatch.setattr("scripts.command_line.jax.devices", fail)
    with pytest.raises(InputError) as refused:
        configure_jax()
    assert str(refused.value) == (
        f"JAX_PLATFORMS is 'cuda', which JAX cannot use ({reason}): unset it, or install the extra of that device: "
        "gpu or tpu"
    )


RICH = "from rich.console import Console\ndef main(_):\n  for _ in range(10**5): Console().print('line')"
PLAIN = "def main(_): print('line\\n' * 10**6)"
SHORT = "import sys\ndef main(_): print('line'); sys.exit(0)"


@pytest.mark.parametrize("main", [RICH, PLAIN, SHORT], ids=["rich", "plain", "left in the buffer"])
def test_output_when_nobody_reads_it_then_the_script_ends_without_a_word(main):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from scripts.one_line_errors import run\n{main}\nrun(main)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_script_when_it_is_interrupted_then_one_line_and_the_exit_code_of_ctrl_c(capsys):
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.mark.parametrize("name", ["train", "eval", "plan", "prepare"])
def test_script_when_it_is_interrupted_while_it_imports_then_it_ends_as_later(tmp_path, name):
    # In place of the library that takes longest.
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    script = ROOT / "scripts" / f"{name}.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
