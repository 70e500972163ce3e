"""How pooled vectors come home, and how their gradients go back: one pair of functions for each family.

Vectors are ``[W, b, P, w]`` at their owner: sender, sample, vector of the owner. At home they are ``[b, X, w]``, where
X depends on the family; `home_places` says where among the X each vector of the group lies. All groups of a family
travel in one exchange, written by a codec (`sharding.codec`). A sum over devices of what is written in less than
float32 is an all-to-all of codes and then a sum in float32, hop by hop, so that errors of a hop are those of its codes
alone.

Letters: W = N * C devices, N nodes, C chips of a node, b samples of one device, P vectors a sample of an owner, w
width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sharding.codec import Codec, decode, encode
from sharding.groups import Group
from sharding.mesh import AXES, CHIP, NODE
from sharding.trip import exchange

# Numbers of a row of a TPU's registers.
_LANES = 128

Owned = Sequence[Float[Array, "W b P w"]]
Home = Sequence[Float[Array, "b X w"]]


def home_places(group: Group, chips: int) -> Int32[np.ndarray, " vectors"]:
    """Where each vector of a group, lookup by lookup, is among those that come home."""
    if group.family == "rows_by_id":
        return np.arange(group.num_vectors, dtype=np.int32)
    places = []
    for lookup in group.lookups:
        first = lookup.first_vector
        if group.family == "table_wise":
            first += lookup.shard.first_device * group.vectors_per_device
        elif group.family == "table_row_wise":
            first += lookup.shard.first_device // chips * group.vectors_per_device
        places.append(first + np.arange(lookup.vectors))
    return np.concatenate(places).astype(np.int32)


def _side_by_side(vectors: Float[Array, "S b P w"]) -> Float[Array, "b SP w"]:
    sources, samples, count, width = vectors.shape
    return vectors.swapaxes(0, 1).reshape(samples, sources * count, width)


def _apart(vectors: Float[Array, "b SP w"], sources: int) -> Float[Array, "S b P w"]:
    samples, count, width = vectors.shape
    return vectors.reshape(samples, sources, count // sources, width).swapaxes(0, 1)


def bring_home_table_wise(owned: Owned, codec: Codec) -> list[Float[Array, "b X w"]]:
    """One all-to-all; X = W * P."""
    come = exchange([encode(vectors, codec) for vectors in owned])
    return [_side_by_side(decode(codes, codec)) for codes in come]


def send_back_table_wise(gradients: Home, num_devices: int, codec: Codec) -> list[Float[Array, "W b P w"]]:
    """The transpose: one all-to-all."""
    come = exchange([encode(_apart(vectors, num_devices), codec) for vectors in gradients])
    return [decode(codes, codec) for codes in come]


def bring_home_row_wise(owned: Owned, nodes: int, codec: Codec) -> list[Float[Array, "b X w"]]:
    """Adds the partial sums over the chips of a node, then over nodes: X = P.

    The first reduce-scatter leaves each chip one part in C of the node's sums, and only that goes between nodes.
    """
    if codec != "float32":
        return _added_over(_added_over_chips(owned, nodes, codec), NODE, codec)
    joined, shapes = _join(owned)
    sums = _of_own_node(joined, nodes)
    # XLA has no reduce-scatter of nothing: of no samples.
    if sums.size:
        sums = jax.lax.psum_scatter(sums, NODE, scatter_dimension=0)
    return _split(sums.reshape(-1), shapes)


def send_back_row_wise(gradients: Home, codec: Codec) -> list[Float[Array, "W b P w"]]:
    """The transpose: all-gather over nodes, then over the chips of a node."""
    written = [encode(vectors, codec) for vectors in gradients]
    joined = jnp.concatenate([codes.reshape(-1) for codes in written])
    everyones = jax.lax.all_gather(jax.lax.all_gather(joined, NODE), CHIP, axis=1)
    return [decode(codes, codec) for codes in _split_owned(everyones, [codes.shape for codes in written])]


def bring_home_table_row_wise(owned: Owned, nodes: int, codec: Codec) -> list[Float[Array, "b X w"]]:
    """Adds the partial sums over the chips of the owning node, then one all-to-all over nodes: X = N * P."""
    if codec != "float32":
        of_node = _added_over_chips(owned, nodes, codec)
        # Sums that are at home already are not written once more.
        between = codec if nodes > 1 else "float32"
        come = exchange([encode(vectors, between) for vectors in of_node], NODE)
        return [_side_by_side(decode(codes, between)) for codes in come]
    joined, shapes = _join(owned)
    come = jax.lax.all_to_all(_of_own_node(joined, nodes), NODE, split_axis=0, concat_axis=0, tiled=True)
    return [_side_by_side(vectors) for vectors in _split_owned(come.reshape(nodes, -1), shapes)]


def send_back_table_row_wise(gradients: Home, nodes: int, codec: Codec) -> list[Float[Array, "W b P w"]]:
    """The transpose: one all-to-all over nodes, then all-gather over the chips of a node."""
    written = [encode(_apart(vectors, nodes), codec) for vectors in gradients]
    joined = jnp.concatenate([codes.reshape(nodes, -1) for codes in written], axis=1)
    come = jax.lax.all_to_all(joined, NODE, split_axis=0, concat_axis=0, tiled=True)
    everyones = jax.lax.all_gather(come, CHIP, axis=1)
    return [decode(codes, codec) for codes in _split_owned(everyones, [codes.shape[1:] for codes in written])]


def send_everywhere(gradients: Home, codec: Codec) -> list[Float[Array, "W b X w"]]:
    """Gradients of a table that every device holds: all-gather. What each has written all read, itself among them."""
    return [decode(jax.lax.all_gather(encode(vectors, codec), AXES), codec) for vectors in gradients]


def _added_over_chips(owned: Owned, nodes: int, codec: Codec) -> list[Float[Array, "N b P w"]]:
    """For each node, what its device with this one's number among its chips gets of the node's sums."""
    parts = [vectors.reshape(nodes, vectors.shape[0] // nodes, *vectors.shape[1:]).swapaxes(0, 1) for vectors in owned]
    return _added_over(parts, CHIP, codec)


def _added_over(parts: Sequence[Float[Array, "M ..."]], axis: str, codec: Codec) -> list[Float[Array, "..."]]:
    """Adds what each device of an axis has for this one: codes by all-to-all, then sums in float32, in order."""
    if parts[0].shape[0] == 1:
        return [part[0] for part in parts]
    come = exchange([encode(part, codec) for part in parts], axis)
    return [jnp.sum(decode(codes, codec), axis=0) for codes in come]


def _of_own_node(joined: Float[Array, "W x"], nodes: int) -> Float[Array, "N rows lanes"]:
    """Adds over the chips of this node: for each node, what its device with this one's number among its chips gets.

    In rows of 128 numbers where they divide, those of all chips in one dimension: of long rows, and of many rows in a
    dimension of their own, TPUs make an all-reduce, which sends twice the bytes.
    """
    lanes = math.gcd(_LANES, joined.shape[1])
    by_node = joined.reshape(nodes, -1, lanes)
    return jax.lax.psum_scatter(by_node, CHIP, scatter_dimension=1, tiled=True) if by_node.size else by_node


def _join(owned: Owned) -> tuple[Float[Array, "W x"], list[tuple[int, ...]]]:
    joined = jnp.concatenate([vectors.reshape(vectors.shape[0], -1) for vectors in owned], axis=1)
    return joined, [vectors.shape[1:] for vectors in owned]


def _split(joined: Float[Array, " x"], shapes: Sequence[tuple[int, ...]]) -> list[Float[Array, "b P w"]]:
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1].tolist()
    return [part.reshape(shape) for part, shape in zip(jnp.split(joined, ends), shapes, strict=True)]


def _split_owned(joined: Float[Array, "... x"], shapes: Sequence[tuple[int, ...]]) -> list[Float[Array, "S b P w"]]:
    sources = math.prod(joined.shape[:-1])
    flat = joined.reshape(sources, joined.shape[-1])
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1].tolist()
    return [part.reshape(sources, *shape) for part, shape in zip(jnp.split(flat, ends, axis=1), shapes, strict=True)]
