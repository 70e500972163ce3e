"""Prepares generated Criteo-shaped lines with scripts/prepare.py and reports speed and peak memory.

    .venv/bin/python benchmarks/prepare.py --lines 5_000_000

The lines are streamed to a file; the conversion runs in a process of its own, whose peak resident memory is compared
with the size of that file. Results go to benchmarks/results/prepare.json.
"""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import tyro
from rich.console import Console
from rich.table import Table

from dlrm_jax.data.criteo.vocabulary import to_hexadecimal
from dlrm_jax.data.criteo_columns import NUM_DENSE
from dlrm_jax.data.hashing import mix64

REPOSITORY = Path(__file__).resolve().parents[1]
# Rows of the tables of Criteo Kaggle.
ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
LINES_AT_ONCE = 65_536
ZIPF_EXPONENT = 1.05
MISSING_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareBenchmark:
    """What to generate and convert.

    Attributes:
        lines: Lines to generate.
        tsv: File of the lines; generated unless it has been with the same number of lines.
        out: Folder of the dataset; kept.
        memory_limit_mb: Passed to prepare.py.
        frequency_threshold: Passed to prepare.py.
        max_rows: Passed to prepare.py.
        results: File of the figures.
    """

    lines: int = 5_000_000
    tsv: Path = Path("/tmp/criteo5m.tsv")
    out: Path = Path("/tmp/criteo5m")
    memory_limit_mb: int = 256
    frequency_threshold: int = 2
    max_rows: int = 250_000
    results: Path = REPOSITORY / "benchmarks" / "results" / "prepare.json"


def generate_lines(lines: int, path: Path) -> None:
    """Writes Criteo-shaped lines whose labels depend on some of their ids and integers."""
    random = np.random.default_rng(0)
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        for start in range(0, lines, LINES_AT_ONCE):
            pyarrow.csv.write_csv(_generate_block(random, min(LINES_AT_ONCE, lines - start)), file, options)
    partial.replace(path)


def _generate_block(random: np.random.Generator, n: int) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    logit = np.full(n, -1.1)
    for i in range(NUM_DENSE):
        values = np.floor(np.exp(random.normal(1.0, 1.5, n))).astype(np.int64) - 1
        logit += 0.1 * (np.log1p(np.maximum(values, 0)) - 1.2) * (1 if i % 2 else -1)
        columns[f"integer_{i}"] = pa.array(values, mask=random.random(n) < MISSING_SHARE)
    for feature, rows in enumerate(ROWS):
        # The inverse of the distribution of a power law between 1 and the number of rows.
        power = 1.0 - ZIPF_EXPONENT
        rank = (1.0 + random.random(n) * ((rows + 1.0) ** power - 1.0)) ** (1.0 / power)
        bits = mix64(rank.astype(np.uint64) ^ np.uint64(feature << 40))
        ids = to_hexadecimal(bits.astype(np.uint32))
        is_missing = random.random(n) < MISSING_SHARE
        logit += 0.25 * ((bits >> np.uint64(40)) / 2.0**23 - 1.0) * ~is_missing
        columns[f"id_{feature}"] = ids.take(pa.array(np.arange(n), mask=is_missing))
    label = (random.random(n) < 1.0 / (1.0 + np.exp(-logit))).astype(np.int8)
    return pa.table({"label": label, **columns})


def run_benchmark(config: PrepareBenchmark) -> dict[str, object]:
    """Generates the lines if need be, converts them in a subprocess and returns the figures."""
    size_file = config.tsv.with_suffix(".lines")
    if not (config.tsv.exists() and size_file.exists() and size_file.read_text() == str(config.lines)):
        generate_lines(config.lines, config.tsv)
        size_file.write_text(str(config.lines))
    command = [sys.executable, "scripts/prepare.py", "criteo", str(config.tsv), "--out", str(config.out)]
    command += ["--memory_limit_mb", str(config.memory_limit_mb), "--max_rows", str(config.max_rows)]
    command += ["--frequency_threshold", str(config.frequency_threshold), "--overwrite"]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=REPOSITORY, check=True, text=True, capture_output=True, env={**os.environ, "COLUMNS": "200"}
    )
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss * 1024
    cpu_seconds = usage.ru_utime + usage.ru_stime
    rates = re.findall(r"^(\w+ \w+) .*?([\d,]+) rows/s", done.stderr, re.MULTILINE)
    card = json.loads((config.out / "card.json").read_text())
    return {
        "command": " ".join(command[1:]),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "lines": config.lines,
        "input_bytes": config.tsv.stat().st_size,
        "seconds": round(seconds, 1),
        "rows_per_second": round(config.lines / seconds),
        "cpu_seconds": round(cpu_seconds, 1),
        "rows_per_cpu_second": round(config.lines / cpu_seconds),
        "rows_per_second_of_pass": {stage: int(rate.replace(",", "")) for stage, rate in rates},
        "peak_rss_bytes": peak,
        "peak_rss_of_input": round(peak / config.tsv.stat().st_size, 3),
        "table_rows": sum(column["num_rows"] for column in card["sparse"]),
    }


def main() -> None:
    config = tyro.cli(PrepareBenchmark, use_underscores=True)
    figures = run_benchmark(config)
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console().print(table)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
