"""Parquet files that are read once from beginning to end, in the memory of some of their pages."""

import os

import pyarrow.parquet as pq

_BYTES_AT_ONCE = 2**20


def open_stream(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """Opens a file for ``iter_batches``, which by default reads all row groups ahead and holds them to the end."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BYTES_AT_ONCE)
