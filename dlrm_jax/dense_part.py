"""The middle of a step: vectors come home, the dense part learns from them, and gradients go back, chunk by chunk.

While the dense part is at work on one chunk of every device's samples, the vectors of the next one and the gradients of
the one before travel. All chunks read the same parameters and their gradients are added, so the number of chunks
changes the speed and, in the last bit, the order of sums.

XLA would not keep to that order by itself: it makes one matrix product of all those that share a weight, and starts and
ends exchanges where its scheduler's figures say, which are rough. So optimization barriers say it: chunk j begins when
the gradients of chunk j - 1 are known and those of chunk j - 2 have arrived, and only then do the vectors of chunk
j + 1 set out. Ids of the next batch travel here, too, and have arrived before gradients leave.

Letters: B samples, b of one device, c of one chunk, W devices, P parameters.
"""

import dataclasses
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dlrm_jax.data.batch import Batch
from dlrm_jax.losses import weighted_bce
from dlrm_jax.recommender import Recommender
from pallas_kernels.norm import norm
from sharding import Embeddings
from sharding.address import Addressed
from sharding.all_reduce import AllReduce, all_reduce_local
from sharding.deliver import Delivered
from sharding.embedding import Pooled
from sharding.gather_few import gather_few
from sharding.in_order import in_order
from sharding.lookup import chunk_of
from sharding.mesh import BY_DEVICE, NODE, REPLICATED
from sharding.route import Routed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a batch asks of the dense part and of the tables.

    Attributes:
        logits: Logits of its samples.
        finite: Whether the loss and all gradients are numbers.
        dense: Gradients of the dense parameters.
        sent: For each chunk, gradients of vectors at the owners of the rows, as `ShardedTables.update` takes them.
        residual: What the all-reduce has yet to add, see `all_reduce_local`; None where it owes nothing.
        delivered: Ids of the next batch, delivered; None if there were none.
    """

    logits: Float[Any, " B"]
    finite: Bool[Any, ""]
    dense: nnx.State
    sent: tuple[Pooled, ...]
    residual: Float[Any, "W P"] | None
    delivered: Delivered | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfChunk:
    """What devices find in their parts of a chunk; the loss is not a number if a gradient of its embeddings is not."""

    loss: Float[Any, " W"]
    logits: Float[Any, " Wc"]
    dense: nnx.State


def dense_gradients(
    dense_params: nnx.State,
    batch: Batch,
    routed: Routed,
    source: Pooled | Embeddings,
    residual: Float[Array, "W P"] | None,
    *,
    addressed: Addressed | None = None,
    recommender: Recommender,
) -> Gradients:
    """Computes the loss of a batch and its gradients.

    Args:
        dense_params: Parameters of the dense part.
        batch: The batch; its ids are not looked at.
        routed: Its ids, routed.
        source: Its vectors: at the owners of the rows, to be brought home here; or at home already.
        residual: What earlier all-reduces owe.
        addressed: Ids of the next batch, addressed, which are delivered beside the dense part.
        recommender: The model; it says how many chunks there are, and how gradients travel.
    """
    tables, chunks, mesh = recommender.tables, recommender.chunks, recommender.tables.mesh
    on_devices = partial(jax.shard_map, mesh=mesh, check_vma=False)
    total_weight = on_devices(_total_local, in_specs=BY_DEVICE, out_specs=REPLICATED)(batch.weight)
    several_nodes = mesh.shape[NODE] > 1

    def arrive(source: Pooled | Embeddings, chunk: int) -> Embeddings:
        if isinstance(source, Embeddings):
            cut = partial(jax.tree.map, partial(chunk_of, chunk=chunk, chunks=chunks))
            return on_devices(cut, in_specs=BY_DEVICE, out_specs=BY_DEVICE)(source)
        return tables.bring_home(source, routed, chunk=chunk, chunks=chunks)

    found: list[_OfChunk] = []
    sent: list[Pooled] = []
    embeddings = arrive(source, 0)
    if chunks > 1:
        source, embeddings = in_order((source, embeddings), mesh)
    delivered = None
    if addressed is not None:
        leaving = addressed
        if several_nodes:
            # Vectors go first; meanwhile ids are addressed.
            leaving, embeddings = in_order((leaving, embeddings), mesh)
        with jax.named_scope("route_ahead"):
            delivered = tables.deliver(leaving)
    for chunk in range(chunks):
        following = arrive(source, chunk + 1) if chunk + 1 < chunks else embeddings
        of_chunk, d_embeddings = on_devices(
            partial(_of_chunk_local, chunk=chunk, recommender=recommender),
            in_specs=(REPLICATED, BY_DEVICE, BY_DEVICE, BY_DEVICE, REPLICATED, BY_DEVICE),
            out_specs=BY_DEVICE,
        )(dense_params, batch.dense, batch.label, batch.weight, total_weight, embeddings)
        found.append(of_chunk)
        if chunk + 1 < chunks:
            dense_params, source, d_embeddings, sent, delivered = in_order(
                (dense_params, source, d_embeddings, sent, delivered), mesh
            )
        elif several_nodes and chunks == 1:
            # Between nodes exchanges are under way nearly all the time, and their order counts: what the gradients of
            # vectors would have to wait for goes first, what waits for nothing goes last, beside the update. Inside a
            # node they are short, and XLA hides more of them if it is free.
            d_embeddings, delivered = in_order((d_embeddings, delivered), mesh)
        sent.append(tables.send_back(routed, d_embeddings, chunk=chunk, chunks=chunks))
        embeddings = following
    logits, finite, own = on_devices(
        partial(_add_up_local, num_devices=tables.num_devices),
        in_specs=BY_DEVICE,
        out_specs=(BY_DEVICE, REPLICATED, BY_DEVICE),
    )(tuple(found))
    if several_nodes:
        own, sent, finite = in_order((own, sent, finite), mesh)
    dense, residual = on_devices(
        partial(_all_reduce_local, how=recommender.config.exchange.all_reduce),
        in_specs=BY_DEVICE,
        out_specs=(REPLICATED, BY_DEVICE),
    )(own, residual)
    return Gradients(
        logits=logits, finite=finite, dense=dense, sent=tuple(sent), residual=residual, delivered=delivered
    )


def _of_chunk_local(
    dense_params: nnx.State,
    dense: Float[Array, "b num_dense"],
    label: Float[Array, " b"],
    weight: Float[Array, " b"],
    total_weight: Float[Array, ""],
    embeddings: Embeddings,
    *,
    chunk: int,
    recommender: Recommender,
) -> tuple[_OfChunk, Embeddings]:
    dense, label, weight = (chunk_of(values, chunk, recommender.chunks) for values in (dense, label, weight))

    def loss_of(dense_params: nnx.State, embeddings: Embeddings) -> tuple[Float[Array, ""], Float[Array, " c"]]:
        logits = recommender.logits_local(dense_params, dense, embeddings)
        return weighted_bce(logits, label, weight, total_weight=total_weight), logits

    with jax.named_scope(f"dense_{chunk}"):
        (loss, logits), (d_dense, d_embeddings) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
            dense_params, embeddings
        )
        # On hosts they come feature by feature, and a norm in another order would cost a copy.
        by_feature = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), d_embeddings)
        loss += jnp.where(jnp.isfinite(norm(by_feature)), 0.0, jnp.nan)
    # An axis for the devices.
    own = jax.tree.map(lambda x: x[None], d_dense)
    return _OfChunk(loss=loss[None], logits=logits, dense=own), d_embeddings


def _add_up_local(found: tuple[_OfChunk, ...], *, num_devices: int) -> tuple[Array, Array, nnx.State]:
    """Adds what this device has found in all chunks, and asks all whether every number is finite."""
    own = jax.tree.map(lambda *parts: reduce(jnp.add, parts), *(part.dense for part in found))
    # The update of the tables waits for this, so it must not wait for the all-reduce: no number of that sum is larger
    # than the largest norm, as often as there are devices.
    good = jnp.isfinite(norm(own) * num_devices)
    loss = sum(part.loss[0] for part in found) + jnp.where(good, 0.0, jnp.nan)
    finite = jnp.isfinite(_total_local(loss[None]))
    return jnp.concatenate([part.logits for part in found]), finite, own


def _total_local(x: Float[Array, " b"]) -> Float[Array, ""]:
    """The sum over all devices."""
    return jnp.sum(gather_few(jnp.sum(x)[None]))


def _all_reduce_local(
    own: nnx.State, residual: Float[Array, "1 P"] | None, *, how: AllReduce
) -> tuple[nnx.State, Array | None]:
    with jax.named_scope("all_reduce"):
        return all_reduce_local(jax.tree.map(lambda x: x[0], own), how, residual)
