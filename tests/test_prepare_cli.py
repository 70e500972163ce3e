"""scripts/prepare.py: what a person types, what it prints, and how it exits."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from criteo_samples import make_lines, write_lines

from dlrm_jax.data.card import DatasetCard, SparseColumn, SplitSummary, read_card, write_card
from dlrm_jax.data.display import ProgressDisplay
from dlrm_jax.data.folder_lock import exclusive

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare.py"


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs the script in this process with a command line; returns its exit code, stdout and stderr."""
    location = importlib.util.spec_from_file_location("prepare_script", SCRIPT)
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        output = capsys.readouterr()
        return code, output.out, output.err

    run.module = vars(module)
    return run


def test_criteo_then_check_reports_a_valid_dataset(tmp_path, prepare):
    path = write_lines(tmp_path / "train.txt", make_lines(700))
    code, out, err = prepare("criteo", path, "--out", tmp_path / "out", "--max_rows", 50, "--multi_hot", "--seed", 3)
    assert code == 0, err
    assert "train 600, validation 50, test 50 samples; 13 dense and 26 sparse features" in out
    assert read_card(tmp_path / "out").source["seed"] == 3
    code, out, err = prepare("check", tmp_path / "out")
    assert code == 0, err
    assert "valid" in out
    assert "cat_25" in out


def test_criteo_when_the_dataset_is_complete_needs_overwrite(tmp_path, prepare):
    path = write_lines(tmp_path / "train.txt", make_lines(100))
    assert prepare("criteo", path, "--out", tmp_path / "out")[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = prepare("criteo", path, "--out", tmp_path / "out", "--frequency_threshold", 2)
    assert code == 2
    assert "complete already; make it anew with --overwrite" in err
    code, _, err = prepare("criteo", path, "--out", tmp_path / "out", "--max_rows", 9, "--overwrite")
    assert code == 2
    assert "holds notes.txt, which --overwrite would not remove" in err
    assert (tmp_path / "out" / "card.json").exists()
    (tmp_path / "out" / "notes.txt").unlink()
    assert prepare("criteo", path, "--out", tmp_path / "out", "--max_rows", 9, "--overwrite")[0] == 0
    assert max(column.num_rows for column in read_card(tmp_path / "out").sparse) == 9


def test_criteo_when_lines_are_malformed_names_the_rejects_file(tmp_path, prepare):
    made = make_lines(700)
    made[5] = ["x"]
    path = write_lines(tmp_path / "train.txt", made)
    code, out, _ = prepare("criteo", path, "--out", tmp_path / "out")
    assert code == 0
    assert f"{tmp_path / 'out' / 'rejects.csv'}: malformed input lines" in out
    code, _, err = prepare("criteo", path, "--out", tmp_path / "strict", "--max_reject_share", 0)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {path}, line 6: 1 columns instead of 40")


def test_synthetic_then_check_reports_a_valid_dataset(tmp_path, prepare):
    sizes = ("--num_train", 3000, "--num_validation", 300, "--num_test", 300)
    code, out, err = prepare("synthetic", "--out", tmp_path / "out", *sizes, "--bag_rows", 50, "--weighted_bags")
    assert code == 0, err
    assert "train 3,000" in out
    code, out, err = prepare("check", tmp_path / "out")
    assert code == 0, err
    assert "weighted" in out


@pytest.mark.slow
def test_kuairand_then_check_reports_a_valid_dataset(tmp_path, prepare, shared):
    code, out, err = prepare("kuairand", shared / "data" / "kuairand", "--out", tmp_path / "out")
    assert code == 0, err
    assert "train 167,281, validation 13,103, test 42,485 samples" in out
    code, out, err = prepare("check", tmp_path / "out")
    assert code == 0, err


def test_check_when_the_dataset_is_wrong_prints_one_line_and_exits_2(tmp_path, prepare):
    path = write_lines(tmp_path / "train.txt", make_lines(100))
    prepare("criteo", path, "--out", tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    card["splits"]["test"]["num_samples"] = 5
    (tmp_path / "out" / "card.json").write_text(json.dumps(card))
    code, out, err = prepare("check", tmp_path / "out")
    assert code == 2
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path / 'out' / 'card.json'}: splits.test.num_samples is 5")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("criteo", "x.tsv", "--out", "o", "--frequency_treshold", "3"), "--frequency_treshold"),
        (("synthetic", "--out", "o", "--out=p"), "--out is given twice, as '--out o' and as '--out=p': keep one"),
        (("criteo", "x.tsv"), "--out"),
        (("check",), "path"),
        (("criteoo", "x.tsv", "--out", "o"), "criteoo"),
        (("criteo", "none.tsv", "--out", "o"), "none.tsv: no such file"),
        (("check", "nowhere"), "no dataset card there"),
        (("synthetic", "--single_rows", "1", "--bag_rows", "1", "--out", "o"), "give --num_interactions 0"),
    ],
)
def test_command_line_when_wrong_exits_2_and_names_what_is_wrong(tmp_path, monkeypatch, prepare, arguments, named):
    monkeypatch.chdir(tmp_path)
    code, _, err = prepare(*arguments)
    assert code == 2
    assert named.lower() in err.lower()
    assert list(tmp_path.iterdir()) == []


TINY = ("synthetic", "--num_train", 300, "--num_validation", 30, "--num_test", 30)


@pytest.mark.parametrize("command", ["criteo", "synthetic"])
@pytest.mark.parametrize("place", ["", "below"])
def test_out_when_a_file_is_in_the_way_then_one_line_names_it(tmp_path, prepare, command, place):
    path = write_lines(tmp_path / "train.txt", make_lines(10))
    out = path / place
    code, _, err = prepare(*(TINY if command == "synthetic" else (command, path)), "--out", out)
    assert code == 2
    assert re.fullmatch(rf"error: {out}: cannot be written \(\w+ \w+( \w+)?\); give another --out\n", err)


def test_out_when_its_name_is_too_long_then_one_line_names_it(tmp_path, prepare):
    code, _, err = prepare(*TINY, "--out", tmp_path / ("a" * 300))
    assert code == 2
    assert err.endswith("aaa: cannot be written (File name too long); give another --out\n")


def test_two_runs_into_one_folder_then_the_second_ends_with_one_line_and_removes_nothing(tmp_path, prepare):
    out = tmp_path / "out"
    with exclusive(out, what="preparing a dataset", instead="another --out"):
        (out / "train").mkdir()
        for flags in ((), ("--overwrite",)):
            code, _, err = prepare(*TINY, "--out", out, *flags)
            assert code == 2
            assert err.startswith(f"error: {out}: another process is preparing a dataset there (process {os.getpid()} ")
            assert err.endswith("); wait until it ends, or give another --out\n")
            assert err.count("\n") == 1
        assert (out / "train").exists()


def test_overwrite_when_the_input_cannot_be_used_then_the_dataset_stays(tmp_path, prepare):
    path = write_lines(tmp_path / "train.txt", make_lines(100))
    assert prepare("criteo", path, "--out", tmp_path / "out")[0] == 0
    for arguments in ((*TINY, "--seed", -1), ("criteo", "none.tsv"), ("kuairand", "nowhere")):
        assert prepare(*arguments, "--out", tmp_path / "out", "--overwrite")[0] == 2
        assert (tmp_path / "out" / "card.json").exists()


def test_overwrite_when_the_input_lies_in_the_folder_then_nothing_is_removed(tmp_path, prepare):
    path = tmp_path / "clicks" / "train" / "day_0"
    path.parent.mkdir(parents=True)
    write_lines(path, make_lines(100))
    before = path.read_bytes()
    code, _, err = prepare("criteo", path.parent, "--out", tmp_path / "clicks", "--overwrite")
    assert (code, path.read_bytes()) == (2, before)
    assert "train/day_0: lies in" in err


def test_check_when_names_hold_brackets_then_they_are_printed_as_they_are(tmp_path, prepare):
    folder = tmp_path / "data[v2]"
    column = SparseColumn(name="user[/id]", num_rows=3)
    card = DatasetCard(name="x", sparse=(column,), splits={"train": SplitSummary(num_samples=2, positive_rate=0.5)})
    (folder / "train").mkdir(parents=True)
    pq.write_table(pa.table({"label": [0.0, 1.0], "user[/id]": [1, 2]}), folder / "train" / "part-0.parquet")
    write_card(card, folder)
    code, out, err = prepare("check", folder)
    assert code == 0, err
    assert "user[/id]" in out
    assert "data[v2]" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "interrupted; the same command continues\n"),
        (("--overwrite",), "interrupted; the same command without --overwrite continues\n"),
    ],
)
def test_ctrl_c_then_one_line_says_how_to_go_on(tmp_path, monkeypatch, prepare, flags, said):
    path = write_lines(tmp_path / "train.txt", make_lines(100))
    line = ("criteo", path, "--out", tmp_path / "out")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", stop)
        code, _, err = prepare(*line, *flags)
    assert code == 130
    assert err == said
    assert not (tmp_path / "out" / "card.json").exists()
    assert prepare(*line)[0] == 0


@pytest.mark.parametrize(
    ("command", "work", "said"),
    [
        (TINY, "prepare_synthetic", "interrupted; the same command continues\n"),
        (("kuairand", "x"), "prepare_kuairand", "interrupted; the same command begins anew\n"),
        (("check", "x"), "check_dataset", "interrupted\n"),
    ],
)
def test_ctrl_c_in_the_other_commands_then_one_line(tmp_path, monkeypatch, prepare, command, work, said):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(prepare.module, work, stop)
    out = () if command[0] == "check" else ("--out", tmp_path)
    assert prepare(*command, *out)[::2] == (130, said)


@pytest.mark.parametrize("command", ["criteo", "kuairand", "synthetic", "check"])
def test_help_describes_every_flag(prepare, command):
    code, out, _ = prepare(command, "--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    descriptions = re.findall(
        r"(--\w+)(?:, --no_\w+)? (?:\{\S+\} |[|\]\[{}A-Za-z.]+ )?(.*?)\((?:default|required)", text
    )
    assert len(descriptions) >= (0 if command == "check" else 3)
    assert [flag for flag, description in descriptions if len(description.split()) < 2] == []


def test_script_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "check", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: nowhere/card.json: no dataset card there")


def test_an_unknown_flag_then_one_line_names_the_nearest(tmp_path, prepare):
    code, _, err = prepare("synthetic", "--out", tmp_path / "out", "--num_tran", 3)
    assert code == 2
    assert err == "error: Unrecognized options: --num_tran, 3; did you mean '--num_train'?; --help lists all flags\n"
