"""Vocabularies: the values of a feature that training shows often enough, numbered from 1 by frequency."""

import dataclasses
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq


class ValueCounts:
    """How often each value of one feature occurs in the training split."""

    def __init__(self) -> None:
        self._counts: pl.DataFrame | None = None

    def add(self, values: pl.Series) -> None:
        """Counts a block of values, or of lists of values; nulls do not count."""
        flat = values.explode() if values.dtype == pl.List else values
        block = pl.DataFrame({"value": flat.cast(pl.String).drop_nulls()})
        block = block.group_by("value", maintain_order=True).agg(pl.len().cast(pl.Int64).alias("count"))
        both = block if self._counts is None else pl.concat([self._counts, block])
        self._counts = both.group_by("value", maintain_order=True).agg(pl.col("count").sum())

    def vocabulary(self, min_count: int) -> "Vocabulary":
        """Numbers the values that occur at least ``min_count`` times: by descending count, then value."""
        counts = self._counts
        if counts is None:
            counts = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
        frequent = counts.filter(pl.col("count") >= min_count).sort(["count", "value"], descending=[True, False])
        return Vocabulary(entries=frequent.with_row_index("id", offset=1).cast({"id": pl.Int64}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Values that have an id of their own; id 0 is for every other value and for a missing one.

    Attributes:
        entries: Columns ``id``, ``value`` and ``count``.
    """

    entries: pl.DataFrame

    @property
    def num_rows(self) -> int:
        """Number of ids, 0 included."""
        return self.entries.height + 1

    def ids(self, values: pl.Series) -> pl.Series:
        """Returns the ids of values, or of lists of values."""
        name = values.name
        if values.dtype == pl.List:
            lists = pl.DataFrame({"row": pl.int_range(len(values), eager=True), name: values})
            flat = lists.explode(name).drop_nulls(name)
            flat = flat.with_columns(self.ids(flat[name]))
            bags = flat.group_by("row", maintain_order=True).agg(name)
            empty = pl.lit([], pl.List(pl.Int64))
            return (
                lists.select("row")
                .join(bags, on="row", how="left", maintain_order="left")
                .select(pl.col(name).fill_null(empty))[name]
            )
        texts = values.cast(pl.String).to_frame("value")
        found = texts.join(self.entries.select("value", "id"), on="value", how="left", maintain_order="left")
        return found["id"].fill_null(0).alias(name)

    def write(self, path: Path) -> None:
        """Writes the entries, and id 0 with a null value, as Parquet."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unknown = pl.DataFrame({"id": [0], "value": [None], "count": [0]}, schema=self.entries.schema)
        # Unlike polars, pyarrow says why it fails.
        pq.write_table(pl.concat([unknown, self.entries]).to_arrow(), path, compression="zstd")
