"""Look routed ids up, pool their rows, and bring the vectors home.

Letters: W devices, b samples of one device, P vectors a sample of an owner, X vectors a sample at home, w stored width,
D dim, N ids of an owner.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import pooled_lookup
from sharding import returns
from sharding.assemble import assemble
from sharding.bags import vectors_at_home, vectors_of_bags
from sharding.codec import code_bytes, decode, encode
from sharding.groups import Group
from sharding.owned import OwnedIds
from sharding.place import Place, divided
from sharding.route import RoutedGroup
from sharding.trip import to_senders


def lookup_local(
    weights: dict[str, Float[Array, "lines line"]],
    routed: tuple[RoutedGroup, ...],
    divisors: Float[Array, "b means"],
    *,
    place: Place,
) -> tuple[Float[Array, "b k D"], ...]:
    """Looks ids up, pools their rows and brings the vectors home.

    Args:
        weights: The device's part of each store of weights.
        routed: Ids of each group of the layout.
        divisors: What each mean is divided by.
        place: Layout and mesh.

    Returns:
        The vectors of each block.
    """
    home: list[Array | None] = [None] * len(routed)
    owned: dict[int, Array] = {}
    for number, group in enumerate(place.layout.groups):
        with jax.named_scope(f"lookup_{group.family}_{group.width}"):
            ids = routed[number].local or routed[number].owned
            if group.family == "rows_by_id":
                continue
            pooled = _pool(weights[group.store], ids, group, place)
            senders = 1 if group.family == "local" else group.num_devices
            vectors = vectors_of_bags(pooled, group, senders, place.device)
        if group.family == "local":
            home[number] = vectors[0]
        else:
            owned[number] = vectors
    with jax.named_scope("return"):
        for family in ("table_wise", "row_wise", "table_row_wise"):
            numbers = place.numbers(family)
            for number, vectors in zip(numbers, _bring_home(family, [owned[n] for n in numbers], place), strict=True):
                home[number] = vectors
    by_id = place.numbers("rows_by_id")
    for number, vectors in zip(by_id, _rows_by_id(weights, routed, by_id, place), strict=True):
        home[number] = vectors
    arrived = [vectors for vectors in home if vectors is not None]
    return divided([assemble(arrived, source) for source in place.sources], divisors, place)


def _pool(store: Float[Array, "lines line"], ids: OwnedIds, group: Group, place: Place) -> Float[Array, "bags w"]:
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
