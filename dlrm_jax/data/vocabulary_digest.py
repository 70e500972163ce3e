"""Which value each id of a feature stands for, in 16 digits: a file of the same name may say something else."""

import hashlib
import os

import polars as pl

from dlrm_jax.data.stream import open_stream

_ROWS_AT_ONCE = 2**20


def vocabulary_digest(path: str | os.PathLike[str]) -> str:
    """A digest of the ids of a vocabulary and their values, in their order; counts and compression do not enter.

    Args:
        path: Parquet file with the columns ``id`` and ``value``.
    """
    digest = hashlib.sha256()
    lines = pl.concat_str("id", pl.col("value").cast(pl.String).fill_null(""), pl.lit(""), separator="\n").str.join("")
    with open_stream(path) as file:
        for rows in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=["id", "value"]):
            digest.update(pl.DataFrame(rows).select(lines).item().encode())
    return digest.hexdigest()[:16]
