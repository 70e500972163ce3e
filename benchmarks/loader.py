"""Samples/s of the loader on Criteo-shaped data, beside the rate at which pyarrow alone decodes the same files.

.venv/bin/python benchmarks/loader.py        # about 3 minutes on 2 cores

The consumer does nothing but read every array. An epoch is timed from its first request to its last batch, the
start of the threads and the first window included. The rate falls with whatever else runs on the machine; the CPU
time a sample, over all threads, hardly does.
"""

import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary, write_card
from dlrm_jax.data.loader import Loader
from dlrm_jax.data.writer import SplitWriter, dataset_schema

# Criteo Terabyte as in MLPerf DLRM-DCNv2: rows of each table, and ids of each bag in the multi-hot case.
NUM_ROWS = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209),
    *(11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
BAG_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
NUM_DENSE = 13
SPLIT = "train"
ROWS_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        num_samples: Samples of the data set with one id a feature.
        num_samples_multi_hot: Samples of the data set with bags.
        batch_sizes: Batch sizes.
        epochs: Epochs that are timed; the median counts.
        threads: Reading threads, of the loader and of plain pyarrow.
        out: JSON file of the results.
    """

    num_samples: int = 2**21
    num_samples_multi_hot: int = 2**18
    batch_sizes: tuple[int, ...] = (2048, 16384)
    epochs: int = 5
    threads: int = 2
    out: Path = Path("benchmarks/results/loader.json")


def write_dataset(directory: str, num_samples: int, bag_sizes: tuple[int, ...] | None) -> None:
    """Writes a data set of the shape of Criteo, with skewed random ids; one id a feature without ``bag_sizes``."""
    card = DatasetCard(
        name="criteo_shaped",
        dense=tuple(DenseColumn(name=f"int_{i}", mean=1.0, std=2.0) for i in range(NUM_DENSE)),
        sparse=tuple(
            SparseColumn(
                name=f"cat_{i}",
                num_rows=num_rows,
                bag=bag_sizes is not None,
                max_pooling_factor=bag_sizes[i] if bag_sizes else 1,
                mean_pooling_factor=bag_sizes[i] if bag_sizes else 1,
            )
            for i, num_rows in enumerate(NUM_ROWS)
        ),
        splits={SPLIT: SplitSummary(num_samples=num_samples, positive_rate=0.25)},
    )
    rng = np.random.default_rng(0)
    with SplitWriter(directory, SPLIT, dataset_schema(card)) as writer:
        for start in range(0, num_samples, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, num_samples - start)
            columns: dict[str, np.ndarray | pa.Array] = {"label": (rng.random(rows) < 0.25).astype(np.float32)}
            columns |= {column.name: rng.exponential(2, rows).astype(np.float32) for column in card.dense}
            for column in card.sparse:
                ids = (column.num_rows * rng.random(rows * column.max_pooling_factor) ** 4).astype(np.int64)
                offsets = np.arange(rows + 1, dtype=np.int32) * column.max_pooling_factor
                columns[column.name] = pa.ListArray.from_arrays(offsets, ids) if column.bag else ids
            writer.write(pa.table(columns))
    write_card(card, directory)


def decode(directory: str, threads: int) -> int:
    """Decodes every row group to Arrow columns with pyarrow alone, and returns the number of rows."""
    footers = {path: pq.read_metadata(path) for path in sorted(Path(directory, SPLIT).glob("*.parquet"))}

    def decode_group(path: Path, group: int) -> int:
        # A reader of its own for each group: one ParquetFile does not bear several threads.
        with pq.ParquetFile(path, metadata=footers[path]) as file:
            return file.read_row_group(group, use_threads=False).num_rows

    groups = [(path, group) for path, footer in footers.items() for group in range(footer.num_row_groups)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode_group, *zip(*groups, strict=True)))


def read_epoch(loader: Loader, epoch: int) -> int:
    """Reads an epoch, touches every array, and returns the number of samples."""
    num_samples = 0
    for batch in loader.batches(epoch):
        for array in (batch.dense, batch.ids.values, batch.ids.lengths, batch.label):
            array.max()
        num_samples += int(np.count_nonzero(batch.weight))
    return num_samples


def time_epochs(read: Callable[[int], int], epochs: int) -> dict[str, list[int] | int]:
    """Times some epochs, after one that warms the page cache."""
    read(0)
    rates, cpu_times = [], []
    for epoch in range(1, epochs + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        num_samples = read(epoch)
        rates.append(round(num_samples / (time.perf_counter() - start)))
        cpu_times.append((time.process_time() - cpu_start) / num_samples)
    return {
        "samples_per_second": rates,
        "median": round(statistics.median(rates)),
        "cpu_ns_per_sample": round(1e9 * statistics.median(cpu_times)),
    }


def measure(settings: Settings, case: str, num_samples: int, bag_sizes: tuple[int, ...] | None) -> list[dict]:
    """Measures one data set: plain pyarrow, then the loader at each batch size."""
    with tempfile.TemporaryDirectory() as directory:
        write_dataset(directory, num_samples, bag_sizes)
        readers: dict[str, Callable[[int], int]] = {
            "pyarrow, row groups decoded": lambda epoch: decode(directory, settings.threads)
        }
        for batch_size in settings.batch_sizes:
            loader = Loader(directory, SPLIT, batch_size=batch_size, threads=settings.threads)
            readers[f"Loader, batch {batch_size}"] = lambda epoch, loader=loader: read_epoch(loader, epoch)
        return [
            {"case": case, "reader": reader, **time_epochs(read, settings.epochs)} for reader, read in readers.items()
        ]


def main(settings: Settings) -> None:
    """Measures both data sets, prints a table and writes the results."""
    load_average = os.getloadavg()[0]  # of other programs: they share the cores
    results = measure(settings, "one id a feature", settings.num_samples, None)
    results += measure(settings, "multi-hot, 214 ids a sample", settings.num_samples_multi_hot, BAG_SIZES)
    table = Table(title=f"Criteo-shaped data; load {load_average:.1f}")
    for heading in ("data", "reader", "samples/s (median)", "lowest", "highest", "CPU ns/sample"):
        table.add_column(heading)
    for result in results:
        rates = result["samples_per_second"]
        figures = (result["median"], min(rates), max(rates), result["cpu_ns_per_sample"])
        table.add_row(result["case"], result["reader"], *(f"{figure:,}" for figure in figures))
    Console().print(table)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("grain", "numpy", "pyarrow")}
    report = {
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
        "load_average": load_average,
        "versions": {"python": platform.python_version(), **versions},
        "settings": {**dataclasses.asdict(settings), "out": str(settings.out)},
        "results": results,
    }
    settings.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
