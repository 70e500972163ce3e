"""Embeddings: what a lookup returns and what an update takes the gradient of.

Letters: b samples, k features of a block, D dim, L longest sequence of a feature.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from sharding.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of a batch, features of one dim side by side, so that a program's size ignores their number.

    Attributes:
        blocks: Pooled embeddings; a block holds the features of one dim of one group, in the order of `names`.
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
        known = [name for names in self.names for name in names] + list(self.sequences)
        raise KeyError(f"no feature {feature!r}; there are {known}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Where a block of `Embeddings` comes from: the pooled features [first, first + count) of a group."""

    group: int
    first: int
    names: tuple[str, ...]
    dim: int


def blocks_of(layout: Layout) -> tuple[Block, ...]:
    """The blocks that a lookup on this layout returns, in order."""
    blocks = []
    for number, group in enumerate(layout.groups):
        dims = group.dims[: len(group.pooled)]
        for dim in sorted(set(dims)):
            first = dims.index(dim)
            names = tuple(feature.name for feature in group.pooled[first : first + dims.count(dim)])
            blocks.append(Block(group=number, first=first, names=names, dim=dim))
    return tuple(blocks)
