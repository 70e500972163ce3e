"""Send gradients to the owners of the rows that were looked up, and update those.

Where the samples of each device were cut into chunks (`sharding.lookup`), the gradients of each chunk travel by
themselves; there is one update with all of them.

Letters: W devices, b samples of one device, c of one chunk, P vectors a sample of an owner, X vectors a sample at home,
w stored width, D dim, N ids of an owner.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int32

from pallas_kernels import Ids, Slots, Stores, row_statistics, sparse_update
from sharding import returns
from sharding.assemble import take_apart
from sharding.bags import bags_at_home, bags_of_vectors
from sharding.codec import decode, encode
from sharding.errors import InputError, check_type
from sharding.groups import Group
from sharding.lookup import chunk_of
from sharding.owned import of_device
from sharding.place import Place, divided
from sharding.route import HomeIds, RoutedGroup
from sharding.state import TableState
from sharding.trip import Trip, to_owners, to_senders
from sharding.vectors import Embeddings


def send_back_local(
    gradients: tuple[Float[Array, "c k D"], ...],
    divisors: Float[Array, "b means"],
    *,
    place: Place,
    chunk: int,
    chunks: int,
) -> tuple[Float[Array, "S c P w"], ...]:
    """Sends the gradients of one chunk of every device's samples to the owners of the rows that were looked up.

    Args:
        gradients: Gradient of the loss with respect to the vectors of each block.
        divisors: What each mean was divided by.
        place: Layout and mesh.
        chunk: Number of the chunk.
        chunks: Chunks of a device's samples.

    Returns:
        For each group, gradients of its vectors, as `sharding.lookup.pool_local` gives the vectors. Those of rows that
        travel by id are still at home: they leave with all others of their row.

    Raises:
        InputError: Gradients are not float32.
    """
    odd = [block.dtype for block in gradients if block.dtype != jnp.float32]
    if odd:
        raise InputError(f"gradients of embeddings are {odd[0]}; embeddings are float32, so give float32")
    blocks = divided(gradients, chunk_of(divisors, chunk, chunks), place)
    home = take_apart(blocks, place.sources, place.layout, _counts_at_home(place))
    sent: dict[int, Array] = {}
    with jax.named_scope(f"send_back_{chunk}"):
        for family in ("local", "rows_by_id", "table_wise", "row_wise", "table_row_wise"):
            numbers = place.numbers(family)
            vectors = _send_family_back(family, [home[number] for number in numbers], place)
            sent |= dict(zip(numbers, vectors, strict=True))
    return tuple(sent[number] for number in range(len(home)))


def check_update(gradients: object, step: ArrayLike) -> None:
    """Raises InputError unless gradients are such as an update takes, and its number, where it is known, is above 0.

    Args:
        gradients: Embeddings, or what `ShardedTables.send_back` gave for each chunk.
        step: Number of the update; at 0 Adam's corrections would divide by 0.
    """
    if not isinstance(gradients, Sequence):
        check_type(gradients, Embeddings, "gradients")
    if isinstance(step, int | float | np.generic | np.ndarray) and (np.any(np.less(step, 1)) or step != int(step)):
        raise InputError(f"step is {step}; updates are counted from 1: give a whole number")


def update_local(
    state: TableState,
    routed: tuple[RoutedGroup, ...],
    sent: tuple[tuple[Float[Array, "S c P w"], ...], ...],
    step: Int32[Array, ""],
    learning_rate_scale: Float[Array, ""],
    enabled: Bool[Array, ""],
    *,
    place: Place,
    seed: int,
) -> TableState:
    """Updates the rows that were looked up, once.

    Args:
        state: The device's part of the tables.
        routed: Ids of each group of the layout.
        sent: For each chunk, gradients of the vectors of each group, from `send_back_local`.
        step: Number of this update, from 1.
        learning_rate_scale: Multiplies every learning rate.
        enabled: False: nothing changes.
        place: Layout and mesh.
        seed: Seed of stochastic rounding.

    Returns:
        The tables after the update.
    """
    of_bags = _gradients_of_bags(sent, routed, place)
    calls = [
        _UpdateCall(
            group=group,
            ids=_ids(ids.owned, group),
            gradients=gradients,
            slots=_slots(group, place.device, learning_rate_scale),
        )
        for group, ids, gradients in zip(place.layout.groups, routed, of_bags, strict=True)
    ]
    stores = dict(state)
    statistics = _statistics_of_whole_rows(stores, routed, calls, step, place)
    for number, call in enumerate(calls):
        group = call.group
        rule = group.table.rule
        if rule is None:
            continue
        with jax.named_scope(f"update_{group.family}_{group.width}"):
            stores[group.store] = sparse_update(
                stores[group.store],
                call.ids,
                call.gradients,
                slots=call.slots,
                step=step,
                seed=jnp.uint32(seed),
                optimizer=rule,
                width=group.width,
                storage_rounding=group.table.rounding,
                statistics=statistics.get(number),
                enabled=enabled,
                implementation=place.kernels,
            )
    return stores


class _UpdateCall(NamedTuple):
    """What the kernels are given for one group, beside its stores."""

    group: Group
    ids: Ids
    gradients: Float[Array, "G w"]
    slots: Slots


def _ids(owned: Ids, group: Group) -> Ids:
    """The ids of a group with the bags that gradients have come for: of rows that travel by id each is its own."""
    if group.family != "rows_by_id":
        return owned
    return dataclasses.replace(owned, offsets=jnp.arange(owned.rows.shape[0] + 1, dtype=jnp.int32))


def _slots(group: Group, device: Int32[Array, ""], learning_rate_scale: Float[Array, ""]) -> Slots:
    """The per-slot arrays of this device."""

    def of(attribute: str, dtype: type) -> Array:
        return of_device(group.of_slots(attribute, dtype), device)

    return Slots(
        first_row=of("first_row", np.int32),
        first_scalar=of("first_scalar", np.int32),
        table=of("stable_id", np.uint32),
        first_column=of("first_column", np.uint32),
        dim=of("dim", np.float32),
        learning_rate=of("learning_rate", np.float32) * learning_rate_scale,
        weight_decay=of("weight_decay", np.float32),
        eps=of("eps", np.float32),
        beta1=of("beta1", np.float32),
        beta2=of("beta2", np.float32),
    )


def _counts_at_home(place: Place) -> list[int]:
    """X of each group."""
    layout = place.layout
    sources = {"table_wise": layout.num_devices, "table_row_wise": place.nodes}
    return [
        group.num_vectors if group.family == "rows_by_id" else group.vectors_per_device * sources.get(group.family, 1)
        for group in layout.groups
    ]


def _gradients_of_bags(
    sent: Sequence[Sequence[Float[Array, "S c P w"]]], routed: Sequence[RoutedGroup], place: Place
) -> list[Float[Array, "G w"]]:
    """Gradients of each group's bags, at the owners of the rows."""
    groups = place.layout.groups
    vectors = [_joined([of_chunk[number] for of_chunk in sent]) for number in range(len(groups))]
    by_id = place.numbers("rows_by_id")
    trips = [_trip(routed[number]) for number in by_id]
    of_records = []
    for number in by_id:
        at_home = encode(bags_at_home(vectors[number][0], groups[number]), place.backward)
        of_records.append(at_home.at[_home(routed[number]).bags].get(mode="fill", fill_value=0))
    bags: dict[int, Array] = {}
    with jax.named_scope("send_back_by_id"):
        for number, of_ids in zip(by_id, to_owners(trips, of_records), strict=True):
            bags[number] = decode(of_ids, place.backward)
    for number, group in enumerate(groups):
        if number not in bags:
            bags[number] = bags_of_vectors(vectors[number], group, place.device)
    return [bags[number] for number in range(len(groups))]


def _joined(chunks: Sequence[Float[Array, "S c P w"]]) -> Float[Array, "S b P w"]:
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)


def _send_family_back(
    family: str, given: Sequence[Float[Array, "c X w"]], place: Place
) -> list[Float[Array, "S c P w"]]:
    if not given:
        return []
    num_devices = place.layout.num_devices
    match family:
        case "table_wise":
            return returns.send_back_table_wise(given, num_devices, place.backward)
        case "row_wise":
            return returns.send_back_row_wise(given, place.backward)
        case "table_row_wise":
            return returns.send_back_table_row_wise(given, place.nodes, place.backward)
        case "local" if num_devices > 1:
            return returns.send_everywhere(given, place.backward)
        case _:
            return [vectors[None] for vectors in given]


def _trip(routed: RoutedGroup) -> Trip:
    assert routed.trip is not None
    return routed.trip


def _home(routed: RoutedGroup) -> HomeIds:
    assert routed.home is not None
    return routed.home


def _statistics_of_whole_rows(
    stores: Mapping[str, Stores],
    routed: Sequence[RoutedGroup],
    calls: Sequence[_UpdateCall],
    step: Int32[Array, ""],
    place: Place,
) -> dict[int, Float[Array, "N k"]]:
    """Sums over whole rows where column slices lie on several devices, by number of the group.

    Each owner's sums of blocks of columns go back to the device that asked for the row, which adds those of all slices
    in column order and sends the result to each owner.
    """
    numbers, partial = [], []
    for number, call in enumerate(calls):
        group = call.group
        rule = group.table.rule
        if rule is None or not group.adds_statistics:
            continue
        sums = row_statistics(
            stores[group.store],
            call.ids,
            call.gradients,
            slots=call.slots,
            step=step,
            optimizer=rule,
            width=group.width,
            storage_rounding=group.table.rounding,
            implementation=place.kernels,
        )
        numbers.append(number)
        partial.append(sums)
    trips = [_trip(routed[number]) for number in numbers]
    come = to_senders(trips, [sums.reshape(sums.shape[0], -1) for sums in partial])
    totals = []
    for number, trip, sums, values in zip(numbers, trips, partial, come, strict=True):
        of_records = values.at[trip.place].get(mode="fill", fill_value=0)
        of_records = of_records.reshape(len(of_records), *sums.shape[1:])
        totals.append(_add_slices(of_records, _home(routed[number]), calls[number].group))
    return dict(zip(numbers, to_owners(trips, totals), strict=True))


def _add_slices(sums: Float[Array, "n blocks k"], home: HomeIds, group: Group) -> Float[Array, "n k"]:
    """Adds the blocks of all slices of each record's row, in column order."""
    slices = group.slices_of_lookups
    index = jnp.arange(sums.shape[0], dtype=jnp.int32)
    within = index - home.lookup_starts[home.lookups]
    total = jnp.zeros((sums.shape[0], sums.shape[2]), jnp.float32)
    for number in range(slices.shape[1]):
        lookup = jnp.asarray(slices[:, number])[home.lookups]
        record = jnp.where(lookup >= 0, home.lookup_starts[lookup] + within, sums.shape[0])
        of_slice = sums.at[record].get(mode="fill", fill_value=0)
        for block in range(sums.shape[1]):
            total = total + of_slice[:, block]
    return total
