"""The `cpu` kernels of layers: interaction, dense layers, cross network; and the norm of their gradients.

What multiplies matrices is there only where `cpu.multiplies` their dtype; its `multiplier` is that of
`cpu/multipliers.h` to use, `amx` or `avx512_bf16`, else the best that this processor has.

Letters: B samples, d columns of x, k embeddings of a sample, D their dimension, P pairs; of a dense layer n inputs and
m outputs; r rank of a cross layer.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.cpu import PARTS, call, or_empty
from pallas_kernels.cross_layer import CrossGrads, CrossLayer, CrossResidual

# Gradients of so few weights are added up by chunks of samples: what a chunk needs stays in a second-level cache.
_FEW_WEIGHTS, _FEW_OUTPUTS, _SAMPLES_OF_CHUNK = 2**18, 512, 4096


def dot_interaction(
    x: Float[Array, "B d"], embeddings: Float[Array, "B k D"], *, self_interaction: bool, rounded: bool = False
) -> tuple[Float[Array, "B d+P"], Float[Array, "B k D"]]:
    """See `pallas_kernels.interaction.dot_interaction`, for float32 and bfloat16. Sums run in the order of columns.

    The handlers go through embeddings feature by feature, since so the kernels of tables write and read them: pooled
    bags are not transposed on their way.

    Args:
        x: As there.
        embeddings: As there.
        self_interaction: As there.
        rounded: Whether to return the embeddings in the dtype of x, where they are in another.

    Returns:
        The result, and the embeddings as they came, or rounded.
    """
    num_vectors = embeddings.shape[1] + (x.shape[1] > 0)
    num_pairs = num_vectors * (num_vectors + (1 if self_interaction else -1)) // 2
    rounded = rounded and embeddings.dtype != x.dtype
    results = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[1] + num_pairs), x.dtype),
        jax.ShapeDtypeStruct(embeddings.shape if rounded else (0,), x.dtype),
    )
    by_feature = jnp.swapaxes(embeddings, 0, 1)
    result, in_dtype = call("dot_interaction", results)(x, by_feature, self_interaction=self_interaction)
    return result, in_dtype if rounded else embeddings


def dot_interaction_grad(
    x: Float[Array, "B d"],
    embeddings: Float[Array, "B k D"],
    cotangent: Float[Array, "B d+P"],
    *,
    dtype: jnp.dtype,
    self_interaction: bool,
) -> tuple[Float[Array, "B d"], Float[Array, "B k D"]]:
    """The gradients of x and of the embeddings, all in one dtype, from that of x and the dot products.

    That of the embeddings is in a `dtype` of its own, but has no more bits than x has. Where it is another than theirs,
    `dot_interaction` has rounded them, sample by sample.
    """
    batch_size, num_embeddings, dim = embeddings.shape
    by_sample = embeddings.dtype != dtype
    results = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((num_embeddings, batch_size, dim), dtype),
    )
    x_grad, by_feature_grad = call("dot_interaction_grad", results)(
        x,
        embeddings if by_sample else jnp.swapaxes(embeddings, 0, 1),
        cotangent,
        by_sample=by_sample,
        self_interaction=self_interaction,
    )
    return x_grad, jnp.swapaxes(by_feature_grad, 0, 1)


def norm(leaves: Sequence[Array]) -> Float[Array, ""]:
    """See `pallas_kernels.norm`."""
    return call("norm", jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential")(*leaves)


def _packed(dtype: jnp.dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    """Memory for a packed operand of a product in a dtype: rows and columns in blocks of 32, at least one."""
    padded = math.prod(-(-max(size, 1) // 32) * 32 for size in sizes)
    return jax.ShapeDtypeStruct((PARTS[dtype] * padded,), jnp.bfloat16)


def linear(
    x: Float[Array, "B n"],
    kernel: Float[Array, "n m"],
    bias: Float[Array, " m"] | None,
    *,
    relu: bool,
    multiplier: str = "",
) -> Float[Array, "B m"]:
    """See `pallas_kernels.linear.linear`, for inputs in bfloat16 or float32.

    Of float32 an infinity, or what bfloat16 rounds to one (from 3.39e38 on), makes NaN; below 2^-110 it has fewer bits,
    since AMX takes subnormal parts for zero.

    Args:
        x: Inputs.
        kernel: Weights.
        bias: None for none.
        relu: Whether a ReLU follows.
        multiplier: See above.
    """
    dtype = x.dtype if relu else jnp.dtype(jnp.float32)
    return _product(x, kernel, bias, relu=relu, computed_in=x.dtype, dtype=dtype, multiplier=multiplier)


def _product(
    x: Float[Array, "B n"],
    kernel: Float[Array, "n m"],
    bias: Float[Array, " m"] | None,
    *,
    mask: Float[Array, "B n"] | None = None,
    transposed: bool = False,
    relu: bool = False,
    computed_in: jnp.dtype,
    dtype: jnp.dtype,
    multiplier: str = "",
) -> Float[Array, "B m"]:
    """`x @ kernel + bias`, or by the kernel's transpose, where x counts as zero that is not positive in the mask.

    Operands are rounded to the dtype that it is `computed_in`, the result to `dtype`.
    """
    num_columns = kernel.shape[0 if transposed else 1]
    product = call(
        "product",
        (_packed(computed_in, *kernel.shape), jax.ShapeDtypeStruct((x.shape[0], num_columns), dtype)),
        vmap_method="sequential",
    )
    given = x, or_empty(mask, (0, 0)), kernel, or_empty(bias, (0,))
    settings = {"transposed": transposed, "relu": relu, "parts": PARTS[computed_in], "multiplier": multiplier}
    return product(*given, **settings)[1]


def linear_grads(
    x: Float[Array, "B n"],
    kernel: Float[Array, "n m"],
    cotangent: Float[Array, "B m"],
    y: Float[Array, "B m"] | None,
    *,
    multiplier: str = "",
) -> tuple[Float[Array, "B n"], Float[Array, "n m"], Float[Array, " m"]]:
    """The gradients of x, of the kernel and of the bias from that of the outputs.

    Two calls: what needs no gradient of x has none computed.

    Args:
        x: Inputs.
        kernel: Weights.
        cotangent: Gradient of the outputs, in their dtype.
        y: The outputs of a layer with a ReLU; None of one without.
        multiplier: See above.
    """
    settings = {"computed_in": x.dtype, "dtype": x.dtype, "multiplier": multiplier}
    x_grad = _product(cotangent, kernel, None, mask=y, transposed=True, **settings)
    return x_grad, *_parameter_grads(x, cotangent, y, multiplier=multiplier)


def _parameter_grads(
    x: Float[Array, "B n"],
    cotangent: Float[Array, "B m"],
    mask: Float[Array, "B m"] | None,
    *,
    multiplier: str = "",
) -> tuple[Float[Array, "n m"], Float[Array, " m"]]:
    num_samples, num_inputs = x.shape
    num_outputs = cotangent.shape[1]
    # By columns of x, for which the cotangent is packed, or by chunks of samples, whose sums are added up then.
    is_small = num_inputs * num_outputs <= _FEW_WEIGHTS and num_outputs <= _FEW_OUTPUTS
    chunks = max(1, num_samples // _SAMPLES_OF_CHUNK) if is_small else 1
    sums = jax.ShapeDtypeStruct((chunks, num_inputs, num_outputs), jnp.float32)
    results = (
        sums if chunks > 1 else _packed(x.dtype, num_samples, num_outputs),
        jax.ShapeDtypeStruct((num_inputs, num_outputs), jnp.float32),
        jax.ShapeDtypeStruct((num_outputs,), jnp.float32),
    )
    gradients = call("parameter_gradients", results, vmap_method="sequential")
    given = x, cotangent, or_empty(mask, (0, 0))
    _, kernel_grad, bias_grad = gradients(*given, chunks=chunks, parts=PARTS[x.dtype], multiplier=multiplier)
    return kernel_grad, bias_grad


def cross_layer(
    first: Float[Array, "B n"],
    x: Float[Array, "B n"],
    rounded: Float[Array, "B n"],
    layer: CrossLayer,
    *,
    is_last: bool,
) -> tuple[Float[Array, "B n"], Float[Array, "B n"], CrossResidual]:
    """See `pallas_kernels.cross`."""
    dtype = first.dtype
    # In float32 both outputs are one; that of the last layer is there as rounded alone.
    is_one = is_last or dtype == jnp.float32
    hidden = _product(rounded, layer.down, None, computed_in=dtype, dtype=dtype)
    factor = _product(hidden, layer.up, layer.bias, computed_in=dtype, dtype=dtype)
    results = (
        jax.ShapeDtypeStruct(first.shape, first.dtype),
        jax.ShapeDtypeStruct((0, 0) if is_one else first.shape, jnp.float32),
    )
    in_place = {2: 1} if x.dtype == jnp.float32 and not is_one else {}
    add = call("cross_sum", results, vmap_method="sequential", input_output_aliases=in_place)
    next_rounded, y = add(first, factor, x)
    return next_rounded if is_one else y, next_rounded, CrossResidual(rounded, hidden, factor)


def cross_layer_grads(
    first: Float[Array, "B n"], residual: CrossResidual, layer: CrossLayer, above: CrossGrads
) -> tuple[CrossGrads, CrossLayer]:
    """See `pallas_kernels.cross`."""
    is_top = above.x_grad is None
    wide = jax.ShapeDtypeStruct(first.shape, jnp.float32)
    results = (
        jax.ShapeDtypeStruct((0, 0) if is_top else first.shape, jnp.float32),
        jax.ShapeDtypeStruct(first.shape, first.dtype),
        wide,
    )
    in_place = {} if is_top or above.cotangent.dtype != jnp.float32 else {0: 0}
    in_place |= {} if above.first_grad is None else {4: 2}
    multiply = call("cross_grads", results, vmap_method="sequential", input_output_aliases=in_place)
    given = above.cotangent, or_empty(above.x_grad, (0, 0)), first, residual.factor, or_empty(above.first_grad, (0, 0))
    cotangent, factor_grad, first_grad = multiply(*given)
    hidden_grad, up_grad, bias_grad = linear_grads(residual.hidden, layer.up, factor_grad, None)
    x_grad, down_grad, _ = linear_grads(residual.rounded, layer.down, hidden_grad, None)
    grads = CrossGrads(above.cotangent if is_top else cotangent, x_grad, first_grad)
    return grads, CrossLayer(down_grad, up_grad, bias_grad)
