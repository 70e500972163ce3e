"""Embeddings: what a lookup returns and what an update takes the gradient of. Their shape does not depend on the plan.

Letters: b samples, k features of a block, D dim, L longest sequence of a feature.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from sharding.groups import stored_width
from sharding.layout import canonical_order, store_name
from sharding.tables import FeatureSpec, TableSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Embeddings(Mapping[str, Any]):
    """Embeddings of a batch by feature, those of one dim side by side, so that a program's size ignores their number.

    Attributes:
        blocks: Pooled embeddings; a block holds the features of one dim of one store, in the order of `names`.
        sequences: Rows of unpooled features, padded with zeros, by name of the feature.
        names: Names of the features of each block.
    """

    blocks: tuple[Float[Any, "b k D"], ...]
    sequences: dict[str, Float[Any, "b L D"]]
    names: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, feature: str) -> Float[Array, "b D"] | Float[Array, "b L D"]:
        """The embedding of one feature: pooled, or the padded sequence of an unpooled one."""
        if feature in self.sequences:
            return self.sequences[feature]
        for block, names in zip(self.blocks, self.names, strict=True):
            if feature in names:
                return block[:, names.index(feature)]
        raise KeyError(f"no feature {feature!r}; there are {list(self)}")

    def __iter__(self) -> Iterator[str]:
        """The features: pooled ones, then sequences."""
        yield from (name for names in self.names for name in names)
        yield from self.sequences

    def __len__(self) -> int:
        """Number of features."""
        return sum(len(names) for names in self.names) + len(self.sequences)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Features whose embeddings lie side by side.

    Attributes:
        features: The features.
        dim: Their dim.
        sequence: Whether it is one unpooled feature rather than pooled ones.
    """

    features: tuple[FeatureSpec, ...]
    dim: int
    sequence: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(feature.name for feature in self.features)

    @property
    def vectors(self) -> int:
        """Vectors a sample."""
        return sum((feature.max_ids or 0) if self.sequence else 1 for feature in self.features)


def blocks_of(tables: Sequence[TableSpec], features: Sequence[FeatureSpec]) -> tuple[Block, ...]:
    """The blocks of pooled features, by store, width and dim; then a block for each unpooled feature."""
    by_name = {table.name: table for table in tables}
    pooled: dict[tuple[str, int, int], list[FeatureSpec]] = {}
    sequences = []
    for feature in canonical_order(tables, features):
        table = by_name[feature.table]
        if feature.pooling == "none":
            sequences.append(Block(features=(feature,), dim=table.dim, sequence=True))
        else:
            key = store_name(table), stored_width(table.dim), table.dim
            pooled.setdefault(key, []).append(feature)
    blocks = [Block(features=tuple(members), dim=key[2], sequence=False) for key, members in pooled.items()]
    return (*blocks, *sequences)
