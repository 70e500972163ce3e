"""The impression log in order of time, one day at a time: days are spilled to disk, so the log is never held."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from dlrm_jax.data.input_files import check_distinct
from dlrm_jax.data.kuairand.csv_rows import read_csv_blocks
from dlrm_jax.data.rejects import Rejects
from sharding.errors import InputError

_COLUMNS: dict[str, type[pl.DataType]] = {
    "user_id": pl.Int64,
    "video_id": pl.Int64,
    "date": pl.Int64,
    "time_ms": pl.Int64,
    "is_click": pl.Int64,
    "long_view": pl.Int64,
    "tab": pl.Int64,
}
_MS_PER_DAY = 86_400_000
# An impression is dated when it is logged, up to about an hour after time_ms, and dates are Chinese time (UTC+8).
_MAX_DAYS_APART = 2


def log_files(source: str | Path) -> list[Path]:
    """Returns the log files of a folder, in order of name.

    Raises:
        InputError: There is no such folder, no log in it, or one of them twice.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of the published KuaiRand-Pure CSV files")
    files = sorted(folder.glob("log_standard*.csv"))
    if not files:
        raise InputError(f"{folder}: no log_standard*.csv there; give the folder of the published CSV files")
    check_distinct(files)
    return files


def spill_days(
    files: Sequence[Path], work: Path, rejects: Rejects, progress: Callable[[int], None] | None = None
) -> list[Path]:
    """Sorts the log into one Parquet file for each day of ``time_ms``.

    Args:
        files: Log files.
        work: Folder for the days; made.
        rejects: Is given malformed lines.
        progress: Called with the number of lines of each block.

    Returns:
        The days' files, in order of time.
    """
    day_of_date = pl.col("date").cast(pl.String).str.to_date("%Y%m%d", strict=False).cast(pl.Int64)
    faults = [
        (~pl.col("is_click").is_in([0, 1]), "is_click is not 0 or 1"),
        (~pl.col("long_view").is_in([0, 1]), "long_view is not 0 or 1"),
        (day_of_date.is_null(), "date is not a date YYYYMMDD"),
        ((pl.col("time_ms") // _MS_PER_DAY - day_of_date).abs() > _MAX_DAYS_APART, "time_ms is far from date"),
    ]
    work.mkdir(parents=True, exist_ok=True)
    writers: dict[int, pq.ParquetWriter] = {}
    paths: dict[int, Path] = {}
    try:
        for path in files:
            for block in read_csv_blocks(path, _COLUMNS, rejects, required=list(_COLUMNS), faults=faults):
                digests = [hashlib.blake2b(line.encode(), digest_size=16).digest() for line in block["line"]]
                rows = block.drop("line").with_columns(
                    pl.Series("digest", digests, pl.Binary), (pl.col("time_ms") // _MS_PER_DAY).alias("day")
                )
                for (day,), part in rows.partition_by("day", as_dict=True, include_key=False).items():
                    table = part.to_arrow()
                    if day not in writers:
                        paths[day] = work / f"day-{day:06d}.parquet"
                        writers[day] = pq.ParquetWriter(paths[day], table.schema)
                    writers[day].write_table(table)
                if progress:
                    progress(block.height)
    finally:
        for writer in writers.values():
            writer.close()
    if not paths:
        raise InputError(f"{files[0].parent}: the log has no well-formed line; give the published CSV files")
    return [paths[day] for day in sorted(paths)]


def read_days(paths: Sequence[Path]) -> Iterator[pl.DataFrame]:
    """Yields the days in order, each sorted by time and without exact duplicates of a line.

    Impressions of equal ``time_ms`` lie in one day, in the order of the files.
    """
    for path in paths:
        day = pl.read_parquet(path).unique("digest", keep="first", maintain_order=True)
        yield day.drop("digest").sort("time_ms", maintain_order=True)
