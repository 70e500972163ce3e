"""Criteo lines for the tests."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

SPLITS = ("train", "validation", "test")


def make_lines(count: int, seed: int = 0, distinct: int = 300) -> list[list[str]]:
    """Lines as lists of fields: Zipf ids, some of them and some integers missing, some integers negative."""
    random = np.random.default_rng(seed)
    integers = random.zipf(1.3, (count, 13)) % 10_000 - 3
    ids = random.zipf(1.3, (count, 26)) % distinct * 2654435761 % 2**32
    labels = random.integers(2, size=count)
    no_integer, no_id = random.random((count, 13)) < 0.2, random.random((count, 26)) < 0.1
    return [
        [
            str(labels[line]),
            *("" if no_integer[line, i] else str(integers[line, i]) for i in range(13)),
            *("" if no_id[line, i] else f"{ids[line, i]:08x}" for i in range(26)),
        ]
        for line in range(count)
    ]


def write_lines(path: Path, made: list[list[str]]) -> Path:
    text = "".join("\t".join(fields) + "\n" for fields in made).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def read_split(directory: Path, split: str) -> dict[str, list]:
    return pq.read_table(sorted((directory / split).glob("*.parquet"))).to_pydict()


def text_of(fields: list[str]) -> bytes:
    return ("\t".join(fields) + "\n").encode()
