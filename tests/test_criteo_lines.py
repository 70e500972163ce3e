"""Criteo lines are parsed, or set aside with the reason, whatever lies beside them."""

import math

import numpy as np
import pytest
from criteo_samples import make_lines, text_of, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data.criteo import lines
from dlrm_jax.data.criteo.lines import TextBlock, cut_blocks, parse_block, read_blocks
from sharding.errors import InputError


def parse(*texts: bytes):
    return parse_block(TextBlock(text=b"".join(texts), first_line=0, num_lines=len(texts)))


def test_line_when_well_formed_gives_label_logarithms_and_ids():
    fields = ["1", "0", "7", "-3", "", *["2"] * 9, "68fd1e64", "", "0000000f", "ABCDEF01", *["00000000"] * 22]
    parsed = parse(text_of(fields))
    assert parsed.label.tolist() == [1.0]
    np.testing.assert_allclose(parsed.dense[:5, 0], [0, math.log(8), 0, 0, math.log(3)], rtol=1e-6)
    assert parsed.ids[:5, 0].tolist() == [0x68FD1E64, 0, 15, 0xABCDEF01, 0]
    assert parsed.present[:5, 0].tolist() == [True, False, True, True, True]
    assert parsed.malformed == ()


def test_ids_when_shorter_than_eight_digits_are_numbers_all_the_same():
    fields = make_lines(1)[0]
    fields[14:18] = ["f", "1e64", "", "00000001"]
    assert parse(text_of(fields)).ids[:4, 0].tolist() == [15, 0x1E64, 0, 1]


@pytest.mark.parametrize(
    ("position", "field", "reason"),
    [
        (0, "2", "label '2' is not 0 or 1"),
        (0, "", "label '' is not 0 or 1"),
        (0, "01", "label '01' is not 0 or 1"),
        (1, "1.5", "integer feature 1 is '1.5'"),
        (13, "0x1f", "integer feature 13 is '0x1f'"),
        (3, " 5", "integer feature 3 is ' 5'"),
        (3, "9" * 19, "integer feature 3 is '9999999999999999999'"),
        (14, "68fd1e6g", "id feature 1 is '68fd1e6g'"),
        (39, "123456789", "id feature 26 is '123456789'"),
        (20, "-1234567", "id feature 7 is '-1234567'"),
        (20, "1234\x00567", "id feature 7 is "),
        (20, '"abcdef"', "id feature 7 is "),
        (39, "", None),
        (13, "-0", None),
        (13, "0000000000000000000000000007", None),
        (13, "-" + "9" * 18, None),
    ],
)
def test_line_when_a_field_is_wrong_is_set_aside_with_its_reason(position, field, reason):
    made = make_lines(3)
    made[1][position] = field
    parsed = parse(*map(text_of, made))
    if reason is None:
        assert parsed.malformed == ()
        return
    assert [(line.line, line.reason.startswith(reason)) for line in parsed.malformed] == [(1, True)]
    assert parsed.lines.tolist() == [0, 2]
    assert parsed.ids[:, 1].tolist() == parse(text_of(made[2])).ids[:, 0].tolist()


@pytest.mark.parametrize(
    "line", [b"\n", b"\r\n", b"1\t2\n", b"\xff\xfe\x00\n", b"0" + b"\t" * 40 + b"\n", b"0\r" + b"\t" * 39 + b"\n"]
)
def test_line_when_it_is_no_line_of_criteo_is_set_aside(line):
    made = make_lines(2)
    parsed = parse(text_of(made[0]), line, text_of(made[1]))
    assert [malformed.line for malformed in parsed.malformed] == [1]
    assert parsed.lines.tolist() == [0, 2]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 39), st.text("019afAFgx+-. \t\r\"'", max_size=10))
def test_parsing_when_a_neighbour_is_malformed_gives_the_same_line(position, field):
    """The fast path and the careful one, which a malformed line in the block switches to, accept the same lines."""
    fields = make_lines(1)[0]
    fields[position] = field
    line = text_of(fields)
    alone, beside = parse(line), parse(line, b"malformed\n")
    assert len(alone.lines) == len(beside.lines)
    np.testing.assert_array_equal(alone.ids, beside.ids)
    np.testing.assert_array_equal(alone.dense, beside.dense)


@pytest.mark.parametrize("suffix", [".tsv", ".gz"])
@pytest.mark.parametrize("block_bytes", [1, 100, 4096, 1 << 20])
def test_blocks_hold_every_line_once_and_are_cut_at_boundaries(tmp_path, monkeypatch, suffix, block_bytes):
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    path = write_lines(tmp_path / f"a{suffix}", make_lines(50))
    whole = b"".join(map(text_of, make_lines(50)))
    blocks = list(cut_blocks(read_blocks(path), [0, 7, 8, 33, 50]))
    assert b"".join(block.text for block in blocks) == whole
    assert [block.first_line for block in blocks] == np.cumsum([0, *(b.num_lines for b in blocks)])[:-1].tolist()
    assert {7, 8, 33} <= {block.first_line for block in blocks}


def test_last_line_when_it_has_no_line_break_counts(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"".join(map(text_of, make_lines(3))).removesuffix(b"\n"))
    assert sum(len(parse_block(block).lines) for block in read_blocks(path)) == 3


@pytest.mark.parametrize("suffix", [".tsv", ".gz"])
def test_first_line_when_a_byte_order_mark_stands_before_it_counts(tmp_path, suffix):
    made = make_lines(3)
    marked = [["\ufeff" + made[0][0], *made[0][1:]], *made[1:]]
    (parsed,) = map(parse_block, read_blocks(write_lines(tmp_path / f"a{suffix}", marked)))
    assert parsed.lines.tolist() == [0, 1, 2]
    assert parsed.label.tolist() == [float(line[0]) for line in made]


def test_file_when_its_compressed_data_is_cut_off_is_an_input_error(tmp_path):
    path = write_lines(tmp_path / "a.gz", make_lines(100))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a\.gz: cannot be read after line 0 .*: copy it again"):
        list(read_blocks(path))
