"""DLRM and DLRM-DCNv2: the dense part of the model, from dense features and pooled embeddings to logits.

Letters: B samples, k features of one group, D embedding dimension.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dlrm_jax.config_types import check_types
from dlrm_jax.layers import MLP, LowRankCross, Projection
from pallas_kernels.interaction import dot_interaction, num_pairs
from sharding.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the dense part of the model looks like; the tables are configured elsewhere."""

    bottom_mlp: tuple[int, ...]
    """Widths of the bottom MLP after the dense features. Empty: dense features enter as they are."""
    top_mlp: tuple[int, ...]
    """Widths of the top MLP after the interaction. The last is 1, the logit."""
    interaction: Literal["dot", "cat", "dcnv2"] = "dot"
    """How dense features and embeddings meet: dot products of all pairs, concatenation, or low-rank cross layers."""
    self_interaction: bool = False
    """Whether `dot` also pairs each vector with itself."""
    cross_layers: int = 3
    """Number of cross layers of `dcnv2`."""
    cross_rank: int = 512
    """Rank of the cross layers of `dcnv2`."""
    projection_dim: int | None = None
    """Dimension to which embeddings of another dimension are projected. None: what `dot` needs, which is the bottom
    MLP's last width (without dense features, the largest embedding dimension); no projection for the others."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrix products compute in. Parameters, sums and logits are float32 in any case."""

    def __post_init__(self):
        """Refuses widths that make no model."""
        check_types(self, "model.")
        for name in ("bottom_mlp", "top_mlp"):
            widths = getattr(self, name)
            if any(width < 1 for width in widths):
                raise InputError(f"model.{name} is {widths}, but every width must be at least 1: remove the others")
        if not self.top_mlp or self.top_mlp[-1] != 1:
            raise InputError(f"model.top_mlp is {self.top_mlp}, but its last width must be 1 (the logit): append 1")
        for name in ("cross_layers", "cross_rank", "projection_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"model.{name} is {value}, but must be at least 1: raise it")
        for name, value, known in (
            ("interaction", self.interaction, ("dot", "cat", "dcnv2")),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise InputError(f"model.{name} is {value!r}, which is not known: choose one of {', '.join(known)}")
        if self.self_interaction and self.interaction != "dot":
            raise InputError(
                f"model.self_interaction is set, but interaction {self.interaction!r} has no pairs: "
                "use interaction 'dot' or unset it"
            )


class DLRM(nnx.Module):
    """The dense part of a deep learning recommendation model.

    With `x` the bottom MLP's output for the dense features and `e_1 ... e_F` the pooled embeddings, projected where
    their dimension asks for it, the logit is `top(z)`, where

    - `dot`: z = [x, <v_i, v_j> for j < i] over v = (x, e_1, ..., e_F) (Naumov et al. 2019);
    - `cat`: z = [x, e_1, ..., e_F];
    - `dcnv2`: z = cross([x, e_1, ..., e_F]) (Wang et al. 2021; MLPerf's DLRM-DCNv2).

    All hidden layers, and the last of the bottom MLP, are followed by a ReLU. Without dense features there is no x.

    Attributes:
        bottom: The bottom MLP, or None without dense features.
        projections: For each group of embeddings, its projection or None.
        cross: The cross layers of `dcnv2`, else None.
        top: The top MLP.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_dense: int,
        embedding_shapes: Sequence[tuple[int, int]],
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
            config: What the model looks like.
            num_dense: Number of dense features; may be 0.
            embedding_shapes: For each group of pooled embeddings, in order, its number of features and their dimension.
            rngs: Its stream `params` gives the random bits.

        Raises:
            InputError: The config does not fit the features.
        """
        dtype = jnp.dtype(config.dtype)
        if not num_dense and config.bottom_mlp:
            raise InputError(
                f"model.bottom_mlp is {config.bottom_mlp}, but there are no dense features: give --model.bottom_mlp "
                "without values"
            )
        bottom_width = config.bottom_mlp[-1] if config.bottom_mlp else num_dense
        dims = tuple(dim for _, dim in embedding_shapes)
        dim = _interaction_dim(config, bottom_width, dims)
        self.config = config
        self.num_dense = num_dense
        self.embedding_shapes = tuple((int(k), int(d)) for k, d in embedding_shapes)
        self.bottom = (
            MLP(num_dense, config.bottom_mlp, last_relu=True, compute_dtype=dtype, rngs=rngs) if num_dense else None
        )
        self.projections = nnx.List(
            None if dim in (None, d) else Projection(k, d, dim, compute_dtype=dtype, rngs=rngs)
            for k, d in self.embedding_shapes
        )
        num_embeddings = sum(k for k, _ in self.embedding_shapes)
        if config.interaction == "dot":
            num_vectors = num_embeddings + bool(num_dense)
            top_width = bottom_width + num_pairs(num_vectors, self_interaction=config.self_interaction)
        else:
            top_width = bottom_width + sum(k * (dim or d) for k, d in self.embedding_shapes)
        if not top_width:
            raise InputError(
                f"interaction {config.interaction!r} of {num_dense} dense features and {num_embeddings} embeddings "
                "gives nothing: add features or choose interaction 'cat'"
            )
        self.cross = (
            LowRankCross(
                top_width, num_layers=config.cross_layers, rank=config.cross_rank, compute_dtype=dtype, rngs=rngs
            )
            if config.interaction == "dcnv2"
            else None
        )
        self.top = MLP(top_width, config.top_mlp, last_relu=False, compute_dtype=dtype, rngs=rngs)

    def __call__(
        self, dense: Float[Array, "B num_dense"], embeddings: Sequence[Float[Array, "B k D"]]
    ) -> Float[Array, " B"]:
        """Computes the logits.

        Args:
            dense: Dense features; with `num_dense` 0, `[B, 0]`.
            embeddings: The groups of pooled embeddings, as `embedding_shapes` named them.

        Returns:
            Logits in float32.

        Raises:
            InputError: Shapes differ from those that the model was built for.
        """
        self._check(dense, embeddings)
        dtype = jnp.dtype(self.config.dtype)
        batch_size = dense.shape[0]
        x = dense.astype(dtype) if self.bottom is None else self.bottom(dense).astype(dtype)
        groups = [
            group if projection is None else projection(group)
            for group, projection in zip(embeddings, self.projections, strict=True)
        ]
        if self.config.interaction == "dot":
            # What comes in one array is rounded as it is read.
            one = len(groups) == 1
            vectors = groups[0] if one else jnp.concatenate([group.astype(dtype) for group in groups], axis=1)
            z = dot_interaction(x, vectors, self.config.self_interaction)
        else:
            z = jnp.concatenate([x, *(group.astype(dtype).reshape(batch_size, -1) for group in groups)], axis=1)
        if self.cross is not None:
            z = self.cross(z)
        return self.top(z)[:, 0]

    def _check(self, dense, embeddings) -> None:
        if dense.ndim != 2 or dense.shape[1] != self.num_dense:
            raise InputError(f"dense has shape {dense.shape}, but the model was built for [B, {self.num_dense}]")
        if len(embeddings) != len(self.embedding_shapes):
            raise InputError(
                f"{len(embeddings)} groups of embeddings are given, but the model was built for "
                f"{len(self.embedding_shapes)}: {self.embedding_shapes}"
            )
        for index, (group, shape) in enumerate(zip(embeddings, self.embedding_shapes, strict=True)):
            if group.shape != (dense.shape[0], *shape):
                raise InputError(
                    f"embedding group {index} has shape {group.shape}, but the model was built for "
                    f"[B, {shape[0]}, {shape[1]}] and dense has B = {dense.shape[0]}"
                )


def _interaction_dim(config: ModelConfig, bottom_width: int, dims: Sequence[int]) -> int | None:
    """The dimension that all embeddings are brought to, or None if each keeps its own."""
    if config.interaction != "dot":
        return config.projection_dim
    if bottom_width and config.projection_dim not in (None, bottom_width):
        raise InputError(
            f"model.projection_dim is {config.projection_dim}, but interaction 'dot' pairs embeddings with the dense "
            f"features' vector of width {bottom_width}: leave it out, or make it the last width of bottom_mlp"
        )
    return bottom_width or config.projection_dim or max(dims, default=None)
