"""A conversion that is interrupted anywhere and run again gives what an uninterrupted one gives."""

from pathlib import Path

import pytest
from criteo_samples import make_lines, write_lines
from full_disk import files_of_at_most

from dlrm_jax.data import resume
from dlrm_jax.data.criteo import CriteoSpec, lines, prepare_criteo
from dlrm_jax.data.journal import Journal
from scripts import prepare
from sharding.errors import InputError


class Interruption(BaseException):
    """Stands for kill -9: nothing in the converter catches it, and nothing is written after it."""


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def interruptible(tmp_path, monkeypatch):
    """A conversion of two files in small blocks and many parts, with a malformed line in every hundred."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 20_000)
    for part in range(2):
        made = make_lines(600, seed=part)
        for line in range(50, 600, 100):
            made[line][0] = "x"
        write_lines(tmp_path / f"part_{part}.gz", made)
    spec = CriteoSpec(split="lines", frequency_threshold=2, standardise=True)

    def convert(out: Path, progress=None):
        files = [tmp_path / f"part_{part}.gz" for part in range(2)]
        options = {"spec": spec, "max_reject_share": 0.05, "memory_limit_mb": 0.2, "rows_per_file": 256}
        return prepare_criteo(files, out, progress=progress, **options)

    return convert


@pytest.mark.parametrize("when", ["before", "after"])
def test_conversion_when_interrupted_at_many_steps_gives_the_same_bytes(tmp_path, monkeypatch, interruptible, when):
    interruptible(tmp_path / "whole")
    record = Journal.record
    interruptions = 0
    steps_left = 0

    def interrupt_every_fifth(journal, step, outcome):
        nonlocal steps_left
        steps_left -= 1
        if steps_left or when == "after":
            record(journal, step, outcome)
        if not steps_left:
            raise Interruption

    monkeypatch.setattr(Journal, "record", interrupt_every_fifth)
    while not (tmp_path / "resumed" / "card.json").exists():
        steps_left = 5
        try:
            interruptible(tmp_path / "resumed")
        except Interruption:
            interruptions += 1
    assert interruptions >= 7
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["counting lines", "counting ids", "making vocabularies", "writing rows"])
def test_conversion_when_interrupted_in_the_middle_of_a_pass_gives_the_same_bytes(tmp_path, interruptible, stage):
    calls = []
    interruptible(tmp_path / "whole", progress=lambda *a: calls.append(a[0]))
    countdown = iter(range(calls.index(stage) + calls.count(stage) // 2))

    def interrupt(*_):
        if next(countdown, None) is None:
            raise Interruption

    with pytest.raises(Interruption):
        interruptible(tmp_path / "resumed", progress=interrupt)
    assert not (tmp_path / "resumed" / "card.json").exists()
    interruptible(tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_conversion_when_resumed_does_not_redo_finished_passes(tmp_path, interruptible):
    def interrupt(stage, *_):
        if stage == "writing rows":
            raise Interruption

    with pytest.raises(Interruption):
        interruptible(tmp_path / "out", progress=interrupt)
    lines_of_stage: dict[str, int] = {}
    interruptible(tmp_path / "out", progress=lambda stage, _, __, rows: lines_of_stage.update({stage: rows}))
    assert lines_of_stage["counting lines"] == 0
    assert "counting ids" not in lines_of_stage or lines_of_stage["counting ids"] == 0
    assert lines_of_stage["writing rows"] == 1200


def test_conversion_when_the_folder_is_of_other_settings_is_an_input_error(tmp_path):
    path = write_lines(tmp_path / "a.tsv", make_lines(100))

    def interrupt(stage, *_):
        if stage == "writing rows":
            raise Interruption

    with pytest.raises(Interruption):
        prepare_criteo([path], tmp_path / "out", progress=interrupt)
    with pytest.raises(InputError, match="frequency_threshold = 1, now asked for 2"):
        prepare_criteo([path], tmp_path / "out", spec=CriteoSpec(frequency_threshold=2))
    prepare_criteo([path], tmp_path / "out")
    with pytest.raises(InputError, match="complete already; make it anew with --overwrite"):
        prepare_criteo([path], tmp_path / "out")


def test_conversion_when_the_disk_is_full_at_any_pass_names_the_folder_and_resumes_with_the_same_bytes(
    tmp_path, interruptible
):
    interruptible(tmp_path / "whole")
    out = tmp_path / "resumed"
    reached = []
    # These fail at begun.json, journal and rejects, sums of counts, vocabularies, rows; the last at the card.
    for size in (100, 400, 1_000, 2_000, 4_000, 8_000, 30_000):
        stages = ["begin"]
        with files_of_at_most(size), pytest.raises(InputError) as refused:
            interruptible(out, progress=lambda stage, *_, stages=stages: stages.append(stage))
        assert str(refused.value) == f"{out}: cannot be written (File too large); give another --out"
        assert not list(out.rglob("part-*.partial"))
        reached.append(stages[-1])
    assert set(reached) == {"begin", "counting ids", "making vocabularies", "writing rows"}
    interruptible(out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", [".lock", "begun.json.partial"])
def test_conversion_when_killed_before_it_had_begun_starts(tmp_path, interruptible, left):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_text("cut o")

    def stop(*_):
        raise Interruption

    with pytest.raises(Interruption):
        interruptible(tmp_path / "out", progress=stop)
    assert (tmp_path / "out" / "begun.json").exists()


@pytest.mark.parametrize("by", ["python", "script"])
def test_conversion_when_killed_after_the_card_was_written_is_tidied_by_the_next(tmp_path, monkeypatch, by):
    path = write_lines(tmp_path / "a.tsv", make_lines(100))
    out = tmp_path / "out"
    prepare_criteo([path], tmp_path / "whole")

    def stop(directory):
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(resume, "remove_leftovers", stop)
        with pytest.raises(Interruption):
            prepare_criteo([path], out)
    assert Path(out, ".prepare").exists()
    with pytest.raises(InputError, match="complete already"):
        prepare_criteo([path], out) if by == "python" else prepare.criteo((path,), out)
    assert contents(out) == contents(tmp_path / "whole")


def test_conversion_when_another_process_is_at_work_in_the_folder_is_refused(tmp_path, interruptible):
    def start_another(*_):
        before = contents(tmp_path / "out")
        with pytest.raises(InputError, match=r"another process is preparing a dataset there .*or give another --out"):
            interruptible(tmp_path / "x" / ".." / "out")
        assert contents(tmp_path / "out") == before
        raise Interruption

    (tmp_path / "x").mkdir()
    with pytest.raises(Interruption):
        interruptible(tmp_path / "out", progress=start_another)


def test_conversion_when_what_was_begun_cannot_be_read_says_so(tmp_path, interruptible):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "begun.json").touch()
    with pytest.raises(InputError, match=r"begun\.json: cannot be read as JSON .* anew with --overwrite"):
        interruptible(tmp_path / "out")


def test_journal_when_its_last_line_is_cut_off_ignores_it(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).record("one", {"lines": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": "two", "outc')
    journal = Journal(path)
    assert journal["one"] == {"lines": 1}
    assert "two" not in journal
    assert path.read_bytes() == whole
