"""What one device does with the ids that it was brought: look up, and update, group by group.

Letters: G bags of a group, w stored width, b samples, k features of a block, D dim, L longest sequence of a feature.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import pooled_lookup, sparse_update
from sharding.layout import Group, Layout
from sharding.state import TableState
from sharding.table_wise import NO_ROW, RoutedGroup, divide, even_bags
from sharding.vectors import Block, Embeddings


def lookup_local(
    weights: dict[str, Float[Array, "lines line"]],
    routed: tuple[RoutedGroup, ...],
    *,
    layout: Layout,
    blocks: tuple[Block, ...],
) -> tuple[tuple[Float[Array, "b k D"], ...], dict[str, Float[Array, "b L D"]]]:
    """Looks up and pools the ids of every group.

    Args:
        weights: Stores of weights.
        routed: Ids of each group of the layout.
        layout: The layout.
        blocks: Which pooled features lie side by side.

    Returns:
        Pooled embeddings by block, and the sequences of unpooled features.
    """
    pooled = []
    for group, ids in zip(layout.groups, routed, strict=True):
        with jax.named_scope(f"lookup_{group.width}"):
            sums = pooled_lookup(
                weights[group.store],
                ids.rows,
                ids.offsets,
                ids.weights,
                width=group.width,
                longest_bag=even_bags(group),
            )
        pooled.append(divide(sums, ids.divisors))
    parts = [_split(bags, group) for bags, group in zip(pooled, layout.groups, strict=True)]
    of_blocks = tuple(
        parts[block.group][0][block.first : block.first + len(block.names), :, : block.dim].swapaxes(0, 1)
        for block in blocks
    )
    sequences = {}
    for group, (_, rows_of_sequences) in zip(layout.groups, parts, strict=True):
        dims = group.dims[len(group.pooled) :]
        for feature, dim, rows in zip(group.sequences, dims, rows_of_sequences, strict=True):
            sequences[feature.name] = rows[..., :dim]
    return of_blocks, sequences


def _split(bags: Float[Array, "G w"], group: Group) -> tuple[Float[Array, "k b w"], tuple[Float[Array, "b L w"], ...]]:
    """Cuts a group's bags into those of pooled features and those of each unpooled one."""
    batch_size = bags.shape[0] // sum(group.bags_per_sample)
    end = len(group.pooled) * batch_size
    pooled = bags[:end].reshape(len(group.pooled), batch_size, group.width)
    sequences = []
    for length in group.bags_per_sample[len(group.pooled) :]:
        first, end = end, end + batch_size * length
        sequences.append(bags[first:end].reshape(batch_size, length, group.width))
    return pooled, tuple(sequences)


def _join(gradients: Embeddings, number: int, group: Group, blocks: tuple[Block, ...]) -> Float[Array, "G w"]:
    """The transpose of cutting: gradients of a group's bags, padded to its width."""

    def padded(x: Float[Array, "... D"]) -> Float[Array, "... w"]:
        padding = [(0, 0)] * (x.ndim - 1) + [(0, group.width - x.shape[-1])]
        return jnp.pad(x, padding).reshape(-1, group.width)

    of_blocks = [
        padded(gradient.swapaxes(0, 1))
        for gradient, block in zip(gradients.blocks, blocks, strict=True)
        if block.group == number
    ]
    return jnp.concatenate(of_blocks + [padded(gradients.sequences[feature.name]) for feature in group.sequences])


def update_local(
    state: TableState,
    routed: tuple[RoutedGroup, ...],
    gradients: Embeddings,
    step: Int32[Array, ""],
    learning_rate_scale: Float[Array, ""],
    enabled: Bool[Array, ""],
    *,
    layout: Layout,
    blocks: tuple[Block, ...],
    seed: int,
) -> TableState:
    """Updates the rows that the ids of every group name.

    Args:
        state: The tables.
        routed: Ids of each group of the layout.
        gradients: Gradient of the loss with respect to what `lookup_local` returned.
        step: Number of this update, from 1.
        learning_rate_scale: Multiplies every learning rate.
        enabled: False: no id names a row.
        layout: The layout.
        blocks: Which pooled features lie side by side.
        seed: Seed of stochastic rounding.

    Returns:
        The tables after the update.
    """
    weights, element_state, row_state = dict(state.weights), dict(state.element_state), dict(state.row_state)
    for number, (group, ids) in enumerate(zip(layout.groups, routed, strict=True)):
        rule = group.shards[0].table.rule
        if rule is None:
            continue
        slots = group.slots()
        slots = dataclasses.replace(slots, learning_rate=slots.learning_rate * learning_rate_scale)
        with jax.named_scope(f"update_{group.width}"):
            weights[group.store], element_state[group.store], row_state[group.store] = sparse_update(
                weights[group.store],
                element_state[group.store],
                row_state[group.store],
                jnp.where(enabled, ids.rows, NO_ROW),
                ids.slots,
                ids.offsets,
                divide(_join(gradients, number, group, blocks), ids.divisors),
                ids.weights,
                logical_rows=ids.logical_rows,
                slots=slots,
                step=step,
                seed=jnp.uint32(seed),
                optimizer=rule,
                width=group.width,
                storage_rounding=group.shards[0].table.rounding,
            )
    return TableState(weights=weights, element_state=element_state, row_state=row_state)
