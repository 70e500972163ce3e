"""The ids of an update, sorted by row, and how the vector subcores share them out.

A *run* is the ids of one row. A run of more than `xla.RUN_BLOCK` ids is summed in blocks of so many, counted from its
first, by a lookup whose table is the gradients; then its *items* are those sums. The items of a shorter run are its
ids. So no run is long, and a row that half of the batch names holds up nobody.

A *unit* is the lines that a row lies on, with all other rows on them: of stores of float32 the line or lines of 128
words, of stores of 16 bits pairs of lines, which share words. Each unit, and each line of row-wise state, is read and
written by one subcore only: shares are cut where all of them change.

Letters: n ids, G bags, w width of a row, S slots, C items of a chunk, U units of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.ids import Ids
from pallas_kernels.mosaic_tpu.lines import LANES, RowShape, pad_columns, pad_to, round_up, row_shape
from pallas_kernels.mosaic_tpu.sorted_ids import sort_ids
from pallas_kernels.mosaic_tpu.units import Units
from pallas_kernels.scans import cummax, cumsum, next_marked, places_of
from pallas_kernels.slots import Slots
from pallas_kernels.sparsecore.lookup import pooled_lookup
from pallas_kernels.xla import RUN_BLOCK

# Of a tag: whether the item is its row's first, its last; the row's place in its largest unit; and the slot.
_LAST_SHIFT, _PLACE_SHIFT, _SLOT_SHIFT = 1, 2, 8
# A unit of pairs, at least 1024 bytes, has a number of less than 30 bits.
HALVES_BITS = 2
_SCALARS_SHIFT = LANES.bit_length() - 1


class Work(NamedTuple):
    """What the kernel is given beside stores, slots and gradients.

    Attributes:
        words: For each chunk of items its fields, C words each: the source of the gradient; the tag, see `tag_fields`;
            for each cut the rank of the unit; where rows have one, the place of the row's scalar if the item is its
            row's last, else -1; for random bits, the row's first column; then, where given, the weight, the statistics
            and the key.
        bounds: First item of each share and the end of the last, padded; then, for each cut, the ranks of their units.
        units: For each cut the units in ascending order, padded to whole blocks. Those of pairs of lines are followed
            by `HALVES_BITS` bits: whether rows of the call lie in the left, and in the right half of its lines.
        sources: Lines of gradients: those of bags, then the sums of blocks of long runs.
        unit_of_id: Rank of the first cut's unit of each id in canonical order, and the place of its row in that.
    """

    words: Int32[Array, " words"]
    bounds: Int32[Array, " bounds"]
    units: list[Int32[Array, " units"]]
    sources: Float[Array, "sources 128"]
    unit_of_id: tuple[Int32[Array, " n"], Int32[Array, " n"]]


def tag_fields(tag: Int32[Array, "..."]) -> tuple[Array, Array, Array, Array]:
    """Whether an item is its row's first; its last; the place of the row in its largest unit; the slot."""
    place = (tag >> _PLACE_SHIFT) & ((1 << (_SLOT_SHIFT - _PLACE_SHIFT)) - 1)
    return (tag & 1) != 0, (tag & (1 << _LAST_SHIFT)) != 0, place, tag >> _SLOT_SHIFT


def bounds_size(shares: int) -> int:
    """Words of each part of `Work.bounds`; a scalar is read as the first of a vector."""
    return round_up(shares + 1 + LANES // 4, LANES)


def share_out(
    ids: Ids,
    gradients: Float[Array, "G w"],
    statistics: Float[Array, "n k"] | None,
    slots: Slots,
    keys: UInt32[Array, " n"] | None,
    enabled: Bool[Array, ""],
    *,
    num_rows: int,
    cuts: Sequence[Units],
    has_scalars: bool,
    chunk: int,
    shares: int,
) -> tuple[Work, tuple[str, ...]]:
    """Sorts the ids by row, stably, and cuts them into as many shares of about as many items.

    Args:
        ids: The ids.
        gradients: As in `pallas_kernels.sparse_update`, like the next two.
        statistics: As there.
        slots: As there.
        keys: For stochastic rounding, `rounding.row_key` of each id's row.
        enabled: False: shares of nothing.
        num_rows: Rows of the store.
        cuts: How stores are cut, the largest units last.
        has_scalars: Whether rows have state of one number.
        chunk: Items of a chunk, C.
        shares: Number of shares.

    Returns:
        The work, and the names of its fields.
    """
    num_ids, (num_bags, width) = ids.rows.shape[0], gradients.shape
    shape, number = row_shape(width), jnp.arange(num_ids, dtype=jnp.int32)
    more = {} if keys is None else {"key": keys}
    row, order, fields, count = sort_ids(ids, statistics, more, num_rows=num_rows, num_slots=slots.table.shape[0])
    fields["source"] = jnp.minimum(fields.pop("bag"), num_bags - 1)
    sources = pad_columns(gradients.astype(jnp.float32), shape.padded_width).reshape(-1, LANES)
    item_of_place = number
    if num_ids > RUN_BLOCK:
        row, fields, blocks, item_of_place = _long_runs_as_blocks(row, fields, sources, shape, num_rows)
        count = jnp.sum(row < num_rows, dtype=jnp.int32)
        sources = jnp.concatenate([sources, blocks])

    slot, is_item = fields.pop("slot"), number < count
    before, after = jnp.roll(row, 1), jnp.where(number + 1 < count, jnp.roll(row, -1), num_rows)
    first, last = (number == 0) | (row != before), row != after
    place = row & ((1 << cuts[-1].shift) - 1)
    words = {
        "source": fields.pop("source"),
        "tag": (slot << _SLOT_SHIFT) | (place << _PLACE_SHIFT) | (_bit(last) << _LAST_SHIFT) | _bit(first),
    }
    units, begins_share = [], is_item
    for k, cut in enumerate(cuts):
        unit = row >> cut.shift
        begins_share = is_item & ((number == 0) | (unit != before >> cut.shift))
        unit_places, upto = places_of(begins_share)
        words[f"rank {k}"] = upto - 1
        of_ranks = unit.at[unit_places].get(mode="fill", fill_value=0)
        if cut.dtype != jnp.float32:
            of_ranks = (of_ranks << HALVES_BITS) | _halves_touched(row, unit_places, count, shape)
        units.append(pad_to(of_ranks, round_up(num_ids, LANES)))
    if has_scalars:
        scalar = row + (slots.first_scalar - slots.first_row)[slot]
        line = scalar >> _SCALARS_SHIFT
        begins_share &= (number == 0) | (line != jnp.roll(line, 1))
        words["scalar"] = jnp.where(is_item & last, scalar, -1)
    if keys is not None:
        words["column"] = slots.first_column[slot]
    words |= fields
    size = round_up(num_ids, chunk)
    in_chunks = [pad_to(_bits(x), size).reshape(-1, 1, chunk) for x in words.values()]
    place_in_first = row & ((1 << cuts[0].shift) - 1)
    shared_out = jnp.where(enabled, count, 0)
    work = Work(
        words=jnp.concatenate(in_chunks, axis=1).reshape(-1),
        bounds=_bounds(begins_share, [words[f"rank {k}"] for k in range(len(cuts))], shared_out, shares),
        units=units,
        sources=sources,
        unit_of_id=(_of_ids(order, words["rank 0"][item_of_place]), _of_ids(order, place_in_first[item_of_place])),
    )
    return work, tuple(words)


def _halves_touched(
    row: Int32[Array, " n"], unit_places: Int32[Array, " n"], count: Int32[Array, ""], shape: RowShape
) -> Int32[Array, " n"]:
    """For each touched unit of pairs, bit 0 if a row lies in the left half of its lines, bit 1 if in the right one."""
    if shape.segments_per_row > 1:
        return jnp.full_like(row, (1 << HALVES_BITS) - 1)
    is_left = (row >> (shape.rows_per_segment.bit_length() - 1)) & 1 == 0
    left_before = jnp.append(0, cumsum(_bit(is_left)))
    start = jnp.append(jnp.minimum(unit_places, count), count)
    num_rows, num_left = jnp.diff(start), jnp.diff(left_before[start])
    return _bit(num_left > 0) | (_bit(num_rows > num_left) << 1)


def _bit(x: Bool[Array, "..."]) -> Int32[Array, "..."]:
    return x.astype(jnp.int32)


def _bits(x: Array) -> Int32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _of_ids(order: Int32[Array, " n"], of_places: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Numbers of the sorted ids, in canonical order."""
    return jnp.zeros_like(of_places).at[order].set(of_places, unique_indices=True)


def _long_runs_as_blocks(
    row: Int32[Array, " n"],
    fields: dict[str, Array],
    sources: Float[Array, "lines 128"],
    shape: RowShape,
    num_rows: int,
) -> tuple[Int32[Array, " n"], dict[str, Array], Float[Array, "lines 128"], Int32[Array, " n"]]:
    """Makes items of sorted ids.

    Returns:
        Rows and fields of the items; the sums of the blocks, to be appended to the sources; and the item that each
        sorted id is part of.
    """
    num_ids = row.shape[0]
    ids = jnp.arange(num_ids, dtype=jnp.int32)
    starts = (ids == 0) | (row != jnp.roll(row, 1))
    start = cummax(jnp.where(starts, ids, 0))
    end = pad_to(next_marked(starts)[1:], num_ids, num_ids)
    valid, within = row < num_rows, ids - start
    is_long = valid & (end - start > RUN_BLOCK)
    begins_block = is_long & (within % RUN_BLOCK == 0)

    # Among RUN_BLOCK neighbouring ids at most one block starts a long run and at most one continues one.
    num_blocks = 2 * -(-num_ids // RUN_BLOCK)
    long_places, long_count = places_of(is_long)
    block_places, block_count = places_of(begins_block)
    starts_of_blocks = long_count.at[block_places[:num_blocks]].get(mode="fill", fill_value=0) - 1
    used = jnp.arange(num_blocks, dtype=jnp.int32) < block_count[-1]
    bounds = jnp.append(jnp.where(used, starts_of_blocks, long_count[-1]), long_count[-1])
    weights = fields.get("weight")
    sums = pooled_lookup(
        sources,
        fields["source"].at[long_places].get(mode="fill", fill_value=0),
        bounds,
        None if weights is None else weights.at[long_places].get(mode="fill", fill_value=0),
        width=shape.padded_width,
        longest_bag=None,
    )

    num_bags = sources.shape[0] // shape.segments_per_row
    fields = dict(fields, source=jnp.where(begins_block, num_bags + block_count - 1, fields["source"]))
    if weights is not None:
        fields["weight"] = jnp.where(begins_block, 1.0, weights)
    items, upto = places_of(valid & (begins_block | ~is_long))
    of_items = {name: x.at[items].get(mode="fill", fill_value=0) for name, x in fields.items()}
    row = row.at[items].get(mode="fill", fill_value=num_rows)
    return row, of_items, sums.reshape(-1, LANES), jnp.maximum(upto - 1, 0)


def _bounds(
    begins_share: Bool[Array, " n"], ranks: Sequence[Int32[Array, " n"]], count: Int32[Array, ""], shares: int
) -> Int32[Array, " bounds"]:
    """`Work.bounds`: shares of equal length, moved on to where one may begin."""
    num_ids = begins_share.shape[0]
    ids = jnp.arange(num_ids + 1, dtype=jnp.int32)
    may_begin = pad_to(begins_share, num_ids + 1) | (ids == count)
    size = (count + shares - 1) // shares
    wanted = jnp.minimum(jnp.arange(bounds_size(shares), dtype=jnp.int32) * size, count)
    items = next_marked(may_begin)[wanted]

    def of_items(rank: Int32[Array, " n"]) -> Int32[Array, " shares"]:
        # Beyond the last item comes the rank after the last one.
        return jnp.where(items < count, rank[jnp.minimum(items, num_ids - 1)], jnp.max(rank) + 1)

    return jnp.concatenate([items, *map(of_items, ranks)])
