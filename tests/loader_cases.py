"""A dataset whose samples follow from their numbers, shared by the tests of the loader."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary, write_card

CARD = DatasetCard(
    name="clicks",
    dense=(DenseColumn(name="row"), DenseColumn(name="price", mean=2.0, std=4.0)),
    sparse=(
        SparseColumn(name="user", num_rows=1000),
        SparseColumn(name="tags", num_rows=100, bag=True, max_pooling_factor=5, mean_pooling_factor=1.5),
        SparseColumn(name="ad", num_rows=7),
        SparseColumn(
            name="clicked", num_rows=50, bag=True, max_pooling_factor=9, mean_pooling_factor=3, weights="clicked_weight"
        ),
    ),
    splits={},
)


def make_table(num_rows):
    """Rows whose content follows from their number, with nulls, empty bags and bags of many lengths."""
    rows = np.arange(num_rows)
    tags = [None if row % 7 == 0 else [int(row + i) % 100 for i in range(row % 5)] for row in rows]
    clicked = [None if row % 11 == 0 else [int(row * i) % 50 for i in range(row % 9)] for row in rows]
    return pa.table(
        {
            "label": pa.array((rows % 3 == 0).astype(np.float32)),
            "row": pa.array(rows.astype(np.float32)),
            "price": pa.array((rows % 10).astype(np.float32)),
            "user": pa.array([None if row % 13 == 0 else int(row) % 1000 for row in rows], pa.int64()),
            "tags": pa.array(tags, pa.list_(pa.int64())),
            "ad": pa.array(rows % 7),
            "clicked": pa.array(clicked, pa.list_(pa.int64())),
            "clicked_weight": pa.array(
                [None if bag is None else [float(row + i) for i in range(len(bag))] for row, bag in enumerate(clicked)],
                pa.list_(pa.float32()),
            ),
        }
    )


def write_dataset(directory, table, *, split="train", rows_per_group=10, rows_per_file=35, card=CARD):
    folder = Path(directory, split)
    folder.mkdir(parents=True)
    for file, start in enumerate(range(0, table.num_rows, rows_per_file)):
        part = table.slice(start, rows_per_file)
        pq.write_table(part, folder / f"part-{file:05d}.parquet", row_group_size=rows_per_group)
    splits = {**card.splits, split: SplitSummary(num_samples=table.num_rows, positive_rate=0.3)}
    write_card(dataclasses.replace(card, splits=splits), directory)
