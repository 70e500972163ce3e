"""Look routed ids up, pool their rows, and bring the vectors home.

The samples of each device may be cut into chunks, whose vectors travel one after the other: those of one chunk while
the dense part is at work on another. Which numbers travel stays the same.

Letters: W devices, b samples of one device, c of one chunk, P vectors a sample of an owner, X vectors a sample at home,
w stored width, D dim, N ids of an owner.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels import Ids, pooled_lookup
from sharding import returns
from sharding.assemble import assemble
from sharding.bags import vectors_at_home, vectors_of_bags
from sharding.codec import code_bytes, decode, encode
from sharding.groups import Group
from sharding.place import Place, divided
from sharding.route import RoutedGroup
from sharding.trip import to_senders


def pool_local(
    weights: dict[str, Float[Array, "lines line"]], routed: tuple[RoutedGroup, ...], *, place: Place
) -> tuple[Float[Array, "S b P w"], ...]:
    """Looks ids up and pools their rows.

    Args:
        weights: The device's part of each store of weights.
        routed: Ids of each group of the layout.
        place: Layout and mesh.

    Returns:
        The vectors of each group, for the samples of each sender: of all devices; but of this one alone where every
        device holds the rows, or where rows have travelled by id, since many samples share one, which travels once.
    """
    pooled: dict[int, Array] = {}
    for number, group in enumerate(place.layout.groups):
        if group.family == "rows_by_id":
            continue
        with jax.named_scope(f"lookup_{group.family}_{group.width}"):
            bags = _pool(weights[group.store], routed[number].local or routed[number].owned, group, place)
            senders = 1 if group.family == "local" else group.num_devices
            pooled[number] = vectors_of_bags(bags, group, senders, place.device)
    by_id = place.numbers("rows_by_id")
    with jax.named_scope("lookup_rows_by_id"):
        for number, vectors in zip(by_id, _rows_by_id(weights, routed, by_id, place), strict=True):
            pooled[number] = vectors[None]
    return tuple(pooled[number] for number in range(len(routed)))


def bring_home_local(
    pooled: tuple[Float[Array, "S b P w"], ...],
    divisors: Float[Array, "b means"],
    *,
    place: Place,
    chunk: int,
    chunks: int,
) -> tuple[Float[Array, "c k D"], ...]:
    """Brings the vectors of one chunk of every device's samples home.

    Args:
        pooled: The vectors of each group, from `pool_local`.
        divisors: What each mean is divided by.
        place: Layout and mesh.
        chunk: Number of the chunk.
        chunks: Chunks of a device's samples.

    Returns:
        The vectors of each block.
    """
    home: dict[int, Array] = {}
    with jax.named_scope(f"return_{chunk}"):
        for family in ("local", "rows_by_id", "table_wise", "row_wise", "table_row_wise"):
            numbers = place.numbers(family)
            given = [chunk_of(pooled[number], chunk, chunks, axis=1) for number in numbers]
            home |= dict(zip(numbers, _bring_home(family, given, place), strict=True))
    arrived = [home[number] for number in range(len(pooled))]
    blocks = [assemble(arrived, source) for source in place.sources]
    return divided(blocks, chunk_of(divisors, chunk, chunks), place)


def chunk_of(values: Shaped[Array, "..."], chunk: int, chunks: int, *, axis: int = 0) -> Shaped[Array, "..."]:
    """One chunk of a device's samples.

    Args:
        values: Something for each sample of the device.
        chunk: Number of the chunk.
        chunks: Chunks of a device's samples, all of one size.
        axis: The axis of samples.
    """
    size = values.shape[axis] // chunks
    return jax.lax.slice_in_dim(values, chunk * size, (chunk + 1) * size, axis=axis)


def _pool(store: Float[Array, "lines line"], ids: Ids, group: Group, place: Place) -> Float[Array, "bags w"]:
    return pooled_lookup(
        store,
        ids.rows,
        ids.offsets,
        ids.weights,
        width=group.width,
        longest_bag=_even_bags(group),
        implementation=place.kernels,
    )


def _even_bags(group: Group) -> int | None:
    """The most ids in one bag, where bags are so even that reading that many from each wastes at most half; or None.

    Decided by the features' limits alone, never by the room for ids, so that growing the room changes no result.
    """
    limits = [
        limit
        for lookup in group.lookups
        for limit in ([1] * lookup.vectors if lookup.feature.pooling == "none" else [lookup.feature.max_ids])
    ]
    bounds = [limit for limit in limits if limit is not None]
    if len(bounds) < len(limits) or max(bounds) * len(bounds) > 2 * sum(bounds):
        return None
    return max(bounds)


def _bring_home(family: str, owned: Sequence[Array], place: Place) -> list[Array]:
    if not owned:
        return []
    match family:
        case "local" | "rows_by_id":
            return [vectors[0] for vectors in owned]
        case "table_wise":
            return returns.bring_home_table_wise(owned, place.forward)
        case "row_wise":
            return returns.bring_home_row_wise(owned, place.nodes, place.forward)
        case _:
            return returns.bring_home_table_row_wise(owned, place.nodes, place.forward)


def _rows_by_id(
    weights: dict[str, Float[Array, "lines line"]], routed: Sequence[RoutedGroup], numbers: list[int], place: Place
) -> list[Float[Array, "b X w"]]:
    """Brings the distinct rows of a device's ids home and pools them there in bag order.

    Rows travel as they are stored, or as codes if those are smaller.
    """
    groups = [place.layout.groups[number] for number in numbers]
    rows, requests = [], []
    for number, group in zip(numbers, groups, strict=True):
        requested, request = routed[number].requested, routed[number].request
        assert requested is not None
        assert request is not None
        bags_of_one = jnp.arange(requested.shape[0] + 1, dtype=jnp.int32)
        store = weights[group.store]
        found = pooled_lookup(
            store, requested, bags_of_one, None, width=group.width, longest_bag=1, implementation=place.kernels
        )
        rows.append(encode(found, place.forward) if _coded(group, place) else found.astype(store.dtype))
        requests.append(request)
    home = []
    for number, group, request, come in zip(numbers, groups, requests, to_senders(requests, rows), strict=True):
        ids = routed[number].home
        assert ids is not None
        pooled = pooled_lookup(
            decode(come, place.forward) if _coded(group, place) else come,
            request.place,
            ids.offsets,
            ids.weights,
            width=group.width,
            longest_bag=_even_bags(group),
        )
        home.append(vectors_at_home(pooled, group))
    return home


def _coded(group: Group, place: Place) -> bool:
    """Whether rows travel as codes."""
    return code_bytes(place.forward, group.width) < group.width * jnp.dtype(group.dtype).itemsize
