"""Malformed lines are counted and written down, and stop the run when there are too many."""

import csv

import pytest

from dlrm_jax.data.rejects import Rejects, RejectsState
from sharding.errors import InputError


def test_rejects_when_there_are_none_leave_no_file(tmp_path):
    (tmp_path / "rejects.csv").write_text("of an earlier run")
    with Rejects(tmp_path / "rejects.csv") as rejects:
        rejects.accept(10)
    assert not (tmp_path / "rejects.csv").exists()


def test_rejects_when_early_wait_for_enough_lines_to_judge(tmp_path):
    rejects = Rejects(tmp_path / "rejects.csv", 0.01, min_lines=1000)
    rejects.add("a", 1, "bad", b"\xff\x00 text")
    rejects.accept(998)
    assert rejects.rejected == 1
    for line in range(9):
        rejects.add("a", 2 + line, "bad", "\udcff")
    with pytest.raises(InputError, match=r"a, line 1: bad \(first of 11 malformed lines among 1009: 1\.09%"):
        rejects.add("a", 11, "bad", "text")


def test_rejects_when_taken_up_again_forget_what_came_after_the_state(tmp_path):
    rejects = Rejects(tmp_path / "rejects.csv", 1.0)
    rejects.add("a", 1, "bad", "one")
    state = rejects.state()
    rejects.add("a", 2, "bad", "two")
    rejects.close()
    with Rejects(tmp_path / "rejects.csv", 1.0, state=RejectsState(**vars(state))) as again:
        again.add("a", 3, "bad", "three")
    with open(tmp_path / "rejects.csv", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["one", "three"]
    assert again.rejected == 2


def test_rejects_when_taken_up_again_without_their_file_then_later_ones_are_written_all_the_same(tmp_path):
    path = tmp_path / "rejects.csv"
    with Rejects(path, 1.0) as rejects:
        rejects.add("a", 1, "bad", "one")
        state = rejects.state()
    path.unlink()
    with Rejects(path, 1.0, state=state) as again:
        again.accept(5)
        assert again.state() == RejectsState(accepted=5, rejected=1, size=0, first=state.first)
        again.add("a", 7, "bad", "two")
    with open(path, newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["two"]
    assert again.rejected == 2
