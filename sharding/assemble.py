"""From vectors of groups to embeddings of features, and the transpose for their gradients.

A feature may be cut into column slices, and the features of one block of `Embeddings` may lie in several groups. All of
this is index arrays: the program does not grow with the number of features.

Letters: b samples, X vectors a sample as they come home, w stored width, k vectors of a block, D dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sharding.layout import Layout
from sharding.returns import home_places
from sharding.vectors import Block


class Part(NamedTuple):
    """Vectors of a block that come from one group, all cut into as many slices.

    Attributes:
        group: Number of the group.
        places: Where each slice of each of them is among the group's vectors at home.
        columns: Columns of a slice.
    """

    group: int
    places: Int32[np.ndarray, "vectors slices"]
    columns: int


class BlockSource(NamedTuple):
    """Where the vectors of a block come from.

    Attributes:
        parts: Vectors from each group.
        order: For each vector of the block, its place among those of all parts.
        sequence: Whether it is a sequence.
    """

    parts: tuple[Part, ...]
    order: Int32[np.ndarray, " k"]
    sequence: bool


def block_sources(layout: Layout, blocks: Sequence[Block], chips: int) -> tuple[BlockSource, ...]:
    """Finds where the vectors of each block come from."""
    slices: dict[str, list[tuple[int, int, np.ndarray, int]]] = {}
    for number, group in enumerate(layout.groups):
        places = np.split(home_places(group, chips), group.vector_starts[1:])
        for lookup, of_lookup in zip(group.lookups, places, strict=True):
            shard = lookup.shard
            entry = (shard.first_column, number, of_lookup, shard.num_columns)
            slices.setdefault(lookup.feature.name, []).append(entry)
    sources = []
    for block in blocks:
        by_source: dict[tuple[int, int], list[np.ndarray]] = {}
        members: list[tuple[tuple[int, int], int, int]] = []
        for feature in block.features:
            of_feature = sorted(slices[feature.name], key=lambda entry: entry[0])
            key = of_feature[0][1], of_feature[0][3]
            vectors = np.stack([entry[2] for entry in of_feature], axis=1)
            first = sum(len(part) for part in by_source.get(key, ()))
            by_source.setdefault(key, []).append(vectors)
            members.append((key, first, len(vectors)))
        parts = tuple(Part(key[0], np.concatenate(vectors), key[1]) for key, vectors in by_source.items())
        starts = dict(zip(by_source, np.cumsum([0, *(len(part.places) for part in parts)])[:-1], strict=True))
        order = np.concatenate([starts[key] + first + np.arange(count) for key, first, count in members])
        sources.append(BlockSource(parts, order.astype(np.int32), block.sequence))
    return tuple(sources)


def assemble(home: Sequence[Float[Array, "b X w"]], source: BlockSource) -> Float[Array, "b k D"]:
    """Puts a block together.

    Args:
        home: Vectors of each group, as they came home.
        source: Where those of the block are.
    """
    parts = []
    for part in source.parts:
        taken = _take(home[part.group], part.places.reshape(-1))[..., : part.columns]
        count, slices = part.places.shape
        parts.append(taken.reshape(taken.shape[0], count, slices * part.columns))
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return _take(joined, source.order)


def take_apart(
    blocks: Sequence[Float[Array, "b k D"]], sources: Sequence[BlockSource], layout: Layout, counts: Sequence[int]
) -> list[Float[Array, "b X w"]]:
    """The transpose of `assemble` over all blocks.

    Args:
        blocks: Gradients of each block.
        sources: Where each block's vectors came from.
        layout: The layout.
        counts: X of each group.

    Returns:
        For each group, the gradients of its vectors as they came home; zeros for those that nobody wanted.
    """
    given: list[list[Array]] = [[] for _ in layout.groups]
    places: list[list[np.ndarray]] = [[] for _ in layout.groups]
    for block, source in zip(blocks, sources, strict=True):
        joined = _take(block, np.argsort(source.order).astype(np.int32))
        first = 0
        for part in source.parts:
            count, slices = part.places.shape
            cut = joined[:, first : first + count].reshape(block.shape[0], count * slices, part.columns)
            first += count
            padding = layout.groups[part.group].width - part.columns
            given[part.group].append(jnp.pad(cut, ((0, 0), (0, 0), (0, padding))))
            places[part.group].append(part.places.reshape(-1))
    gradients = []
    for parts, of_parts, count in zip(given, places, counts, strict=True):
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        wanted = np.concatenate(of_parts)
        inverse = np.full(count, len(wanted), np.int32)
        inverse[wanted] = np.arange(len(wanted))
        gradients.append(_take(joined, inverse))
    return gradients


def _take(vectors: Float[Array, "b n w"], places: Int32[np.ndarray, " m"]) -> Float[Array, "b m w"]:
    """Takes vectors; zeros for a place beyond the last. Where they lie side by side, nothing is gathered."""
    first = int(places[0]) if len(places) else 0
    if np.array_equal(places, np.arange(first, first + len(places))) and first + len(places) <= vectors.shape[1]:
        return vectors if len(places) == vectors.shape[1] else vectors[:, first : first + len(places)]
    return vectors.at[:, jnp.asarray(places)].get(mode="fill", fill_value=0)
