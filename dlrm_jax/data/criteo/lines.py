"""Lines of the Criteo click logs: read in blocks of text, parsed to numpy columns, malformed ones set aside.

Letters: n lines of a block.
"""

import dataclasses
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv
from jaxtyping import Bool, Float32, Int64, UInt32

from dlrm_jax.data.criteo_columns import NUM_DENSE, NUM_SPARSE
from sharding.errors import InputError

BLOCK_BYTES = 4 << 20
_COLUMNS = [f"{i}" for i in range(1 + NUM_DENSE + NUM_SPARSE)]
_TYPES = {name: pa.int64() if 1 <= i <= NUM_DENSE else pa.binary() for i, name in enumerate(_COLUMNS)}
_INTEGER = re.compile(rb"-?0*[0-9]{1,18}")
_LARGEST_INTEGER = 10**18 - 1
_ID = re.compile(rb"[0-9a-fA-F]{1,8}")
# A longer line cannot be well-formed, so its end is not kept.
_LINE_LIMIT = 1 << 20
# Bytes that a well-formed block may hold. Anything else, such as the blanks, 0x and + that Arrow's parser would let
# pass in an integer, is left to the careful path.
_WELL_FORMED = b"0123456789abcdefABCDEF-\t\n"
# What some editors and exports begin a file of UTF-8 with. It is no part of the first line.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _hexadecimal_pairs() -> np.ndarray:
    """For two characters, read as one little-endian uint16: the byte that they spell, or 256 if they spell none."""
    values = np.full(256, 16, np.int64)
    for value, digits in enumerate(
        ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "aA", "bB", "cC", "dD", "eE", "fF")
    ):
        for digit in digits:
            values[ord(digit)] = value
    first, second = values[None, :], values[:, None]
    return np.where((first < 16) & (second < 16), 16 * first + second, 256).astype(np.uint16).reshape(-1)


_HEXADECIMAL_PAIRS = _hexadecimal_pairs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBlock:
    """Consecutive whole lines of a file.

    Attributes:
        text: The lines, each with its line break.
        first_line: Number of the first one; lines count from 0 here.
        num_lines: How many there are.
    """

    text: bytes
    first_line: int
    num_lines: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MalformedLine:
    """A line that cannot be used: its number, counted from 0, what is wrong with it, and its text."""

    line: int
    reason: str
    text: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParsedBlock:
    """The lines of a block.

    Attributes:
        lines: Number of each well-formed line in its file, counted from 0.
        label: 0 or 1.
        dense: The integers after ``log(1 + max(x, 0))``; 0 where they are missing.
        ids: The ids; 0 where they are missing.
        present: Whether there is an id.
        malformed: The other lines.
    """

    lines: Int64[np.ndarray, " n"]
    label: Float32[np.ndarray, " n"]
    dense: Float32[np.ndarray, "13 n"]
    ids: UInt32[np.ndarray, "26 n"]
    present: Bool[np.ndarray, "26 n"]
    malformed: tuple[MalformedLine, ...]


def read_blocks(path: str | os.PathLike[str], *, progress: Callable[[int], None] | None = None) -> Iterator[TextBlock]:
    """Reads a file, plain or gzip-compressed (told apart by its first bytes), in blocks of whole lines.

    Args:
        path: The file.
        progress: Called with the number of bytes of the file, compressed or not, that have been read so far.

    Yields:
        The file's blocks in order, of about ``BLOCK_BYTES``. A last line without a line break is given one.

    Raises:
        InputError: The file cannot be read, or its compressed data is damaged.
    """
    first_line = 0
    pending = b""
    try:
        with open(path, "rb") as raw, _opened(raw) as stream:
            while chunk := stream.read(BLOCK_BYTES):
                if progress:
                    progress(raw.tell())
                cut = chunk.rfind(b"\n") + 1
                if not cut:
                    pending = (pending + chunk)[:_LINE_LIMIT]
                    continue
                text, pending = pending + chunk[:cut], chunk[cut:]
                num_lines = text.count(b"\n")
                yield TextBlock(text=text, first_line=first_line, num_lines=num_lines)
                first_line += num_lines
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{os.fspath(path)}: cannot be read after line {first_line} ({error}): copy it again"
        ) from error
    if pending:
        yield TextBlock(text=pending + b"\n", first_line=first_line, num_lines=1)


def cut_blocks(blocks: Iterable[TextBlock], boundaries: Sequence[int]) -> Iterator[TextBlock]:
    """Cuts blocks so that none reaches across a boundary.

    Args:
        blocks: The blocks of a file.
        boundaries: Line numbers in ascending order; a block may end before such a line but not hold it and the line
            before it.

    Yields:
        The same lines in smaller blocks.
    """
    for block in blocks:
        inside = [line for line in boundaries if block.first_line < line < block.first_line + block.num_lines]
        if not inside:
            yield block
            continue
        ends = np.flatnonzero(np.frombuffer(block.text, np.uint8) == ord("\n")) + 1
        edges = [block.first_line, *inside, block.first_line + block.num_lines]
        offsets = [0, *(int(ends[line - block.first_line - 1]) for line in edges[1:])]
        for piece in range(len(edges) - 1):
            yield TextBlock(
                text=block.text[offsets[piece] : offsets[piece + 1]],
                first_line=edges[piece],
                num_lines=edges[piece + 1] - edges[piece],
            )


def parse_block(block: TextBlock) -> ParsedBlock:
    """Parses the lines of a block.

    Well-formed lines have 40 columns separated by tabs: the label 0 or 1, 13 integers of at most 18 digits and 26 ids
    of at most 8 hexadecimal digits, of which integers and ids may be empty. A line may end in CR LF.
    """
    lines = block.first_line + np.arange(block.num_lines)
    columns = _parse(block.text, block.num_lines)
    malformed: list[MalformedLine] = []
    if columns is None:
        well_formed = []
        for number, line in enumerate(block.text.removesuffix(b"\n").split(b"\n"), start=block.first_line):
            line = line.removesuffix(b"\r")
            reason = _what_is_wrong(line)
            if reason is None:
                well_formed.append((number, line))
            else:
                malformed.append(MalformedLine(line=number, reason=reason, text=line))
        lines = np.array([number for number, _ in well_formed], np.int64)
        columns = _parse(b"".join(line + b"\n" for _, line in well_formed), len(well_formed))
        if columns is None:
            raise AssertionError(f"the fast and the careful parser disagree on a line from {block.first_line} on")
    label, dense, ids, present = columns
    return ParsedBlock(lines=lines, label=label, dense=dense, ids=ids, present=present, malformed=tuple(malformed))


def _opened(raw: IO[bytes]) -> IO[bytes]:
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    stream = gzip.GzipFile(fileobj=raw) if compressed else raw
    if stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
        stream.seek(0)
    return stream  # pyright: ignore[reportReturnType]  # both read bytes


def _parse(text: bytes, num_lines: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Parses text whose lines are all well-formed; returns None if one may not be."""
    if not num_lines:
        ids = np.zeros((NUM_SPARSE, 0), np.uint32)
        return np.zeros(0, np.float32), np.zeros((NUM_DENSE, 0), np.float32), ids, ids > 0
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    if text.translate(None, _WELL_FORMED):
        return None
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(text),
            read_options=pyarrow.csv.ReadOptions(column_names=_COLUMNS, use_threads=False, block_size=len(text) + 1),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=_TYPES, null_values=[""], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != num_lines:
        return None
    lengths, characters = _characters(table.column(0).combine_chunks())
    if (lengths != 1).any() or characters.min() < ord("0") or characters.max() > ord("1"):
        return None
    label = (characters == ord("1")).astype(np.float32)
    integers = np.stack([table.column(1 + i).fill_null(0).to_numpy() for i in range(NUM_DENSE)])
    if integers.max() > _LARGEST_INTEGER or integers.min() < -_LARGEST_INTEGER:
        return None
    ids = np.zeros((NUM_SPARSE, num_lines), np.uint32)
    present = np.empty((NUM_SPARSE, num_lines), np.bool_)
    for feature in range(NUM_SPARSE):
        parsed = _parse_ids(table.column(1 + NUM_DENSE + feature).combine_chunks())
        if parsed is None:
            return None
        present[feature], ids[feature, present[feature]] = parsed
    return label, np.log1p(np.maximum(integers, 0).astype(np.float32)), ids, present


def _parse_ids(column: pa.BinaryArray) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns which of the texts are not empty, and their hexadecimal values; None if one is not hexadecimal."""
    lengths, digits = _characters(column)
    present = lengths > 0
    if len(digits) != 8 * np.count_nonzero(present) or (lengths[present] != 8).any():
        if lengths.max() > 8:
            return None
        # Shorter ids are padded with zeros on the left.
        lengths = lengths[present].astype(np.int64)
        padded = np.full((len(lengths), 8), ord("0"), np.uint8)
        padded[np.arange(8) >= 8 - lengths[:, None]] = digits
        digits = padded.reshape(-1)
    pairs = _HEXADECIMAL_PAIRS[digits.view("<u2")]
    if len(pairs) and pairs.max() > 255:
        return None
    return present, pairs.astype(np.uint8).view(">u4").astype(np.uint32)


def _characters(column: pa.BinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the length of each text, and the characters of all of them."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    characters = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]] if data is not None else np.zeros(0, np.uint8)
    return np.diff(bounds), characters


def _what_is_wrong(line: bytes) -> str | None:
    fields = line.split(b"\t")
    if len(fields) != len(_COLUMNS):
        return f"{len(fields)} columns instead of {len(_COLUMNS)}"
    if fields[0] not in (b"0", b"1"):
        return f"label {_shown(fields[0])} is not 0 or 1"
    for i, field in enumerate(fields[1 : 1 + NUM_DENSE], start=1):
        if field and not _INTEGER.fullmatch(field):
            return f"integer feature {i} is {_shown(field)}, not an integer of at most 18 digits"
    for i, field in enumerate(fields[1 + NUM_DENSE :], start=1):
        if field and not _ID.fullmatch(field):
            return f"id feature {i} is {_shown(field)}, not 1 to 8 hexadecimal digits"
    return None


def _shown(field: bytes) -> str:
    text = field[:40].decode("utf-8", errors="backslashreplace")
    return f"{text!r}{'...' if len(field) > 40 else ''}"
