"""Embedding tables as anybody would write them in numpy: one float64 array a table, one loop a bag."""

from collections.abc import Mapping, Sequence

import numpy as np
from row_oracle import ELEMENT_STATES, ROW_STATES, updated_row

from sharding import FeatureSpec, TableSpec

Bags = Mapping[str, Sequence[Sequence[int]]]
BagWeights = Mapping[str, Sequence[Sequence[float]]]


class PlainTables:
    """The model that ShardedTables is compared with."""

    def __init__(self, tables: Sequence[TableSpec], features: Sequence[FeatureSpec], start: Mapping[str, np.ndarray]):
        self.tables = {table.name: table for table in tables}
        self.features = {feature.name: feature for feature in features}
        self.rows = {name: rows.astype(np.float64) for name, rows in start.items()}
        self.state = {}
        for table in tables:
            if not table.frozen:
                shape = (table.num_rows, table.dim)
                self.state[table.name] = [np.zeros(shape) for _ in range(ELEMENT_STATES[table.optimizer])]
                self.state[table.name] += [np.zeros(table.num_rows) for _ in range(ROW_STATES[table.optimizer])]

    def valid(self, feature: FeatureSpec, row: int) -> bool:
        return 0 <= row < self.tables[feature.table].num_rows

    def scales(self, feature: FeatureSpec, bag: Sequence[int], weights: Sequence[float] | None) -> list[float]:
        """What each id's row is multiplied by."""
        given = [1.0] * len(bag) if weights is None else [float(np.float32(w)) for w in weights]
        total = sum(given)
        if feature.pooling == "mean":
            return [scale / total if total else 0.0 for scale in given]
        return given

    def lookup(self, bags: Bags, weights: BagWeights | None = None) -> dict[str, np.ndarray]:
        result = {}
        for name, feature in self.features.items():
            rows = self.rows[feature.table]
            length = 1 if feature.pooling != "none" else feature.max_ids or 0
            vectors = np.zeros((len(bags[name]), length, rows.shape[1]))
            for sample, bag in enumerate(bags[name]):
                scales = self.scales(feature, bag, (weights or {}).get(name, [None] * len(bags[name]))[sample])
                for position, (row, scale) in enumerate(zip(bag, scales, strict=True)):
                    if self.valid(feature, row):
                        vectors[sample, position if feature.pooling == "none" else 0] += scale * rows[row]
            result[name] = vectors if feature.pooling == "none" else vectors[:, 0]
        return result

    def update(
        self,
        bags: Bags,
        gradients: Mapping[str, np.ndarray],
        weights: BagWeights | None = None,
        *,
        step: int,
        learning_rate_scale: float = 1.0,
    ) -> None:
        sums: dict[tuple[str, int], np.ndarray] = {}
        for name, feature in self.features.items():
            for sample, bag in enumerate(bags[name]):
                scales = self.scales(feature, bag, (weights or {}).get(name, [None] * len(bags[name]))[sample])
                for position, (row, scale) in enumerate(zip(bag, scales, strict=True)):
                    if self.valid(feature, row):
                        gradient = gradients[name][sample].astype(np.float64)
                        gradient = gradient[position] if feature.pooling == "none" else gradient
                        key = feature.table, row
                        sums[key] = sums.get(key, 0.0) + scale * gradient
        for (name, row), gradient in sums.items():
            table = self.tables[name]
            if table.frozen:
                continue
            new_row, new_state = updated_row(
                table.optimizer,
                self.rows[name][row],
                [values[row] for values in self.state[name]],
                gradient,
                dim=table.dim,
                step=step,
                learning_rate=table.learning_rate * learning_rate_scale,
                weight_decay=table.weight_decay,
                eps=table.eps,
                beta1=table.beta1,
                beta2=table.beta2,
            )
            self.rows[name][row] = new_row
            for values, value in zip(self.state[name], new_state, strict=True):
                values[row] = value
