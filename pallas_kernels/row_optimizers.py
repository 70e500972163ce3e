"""Row optimizers: update rules as pure functions of one block of rows.

Each rule is applied once to each row that the global batch touches, to the sum of the gradients of all its
occurrences ("exact": Mudigere et al. 2022, section 4.1.2). All rules are *lazy*: a row that no id touches does not
move, and its moments do not decay. The bias corrections of Adam and LAMB use the number of the update since training
began, not the number of times that the row was touched.

Some rules need a statistic of the whole row, and a row may be cut into column shards. So a rule says which
elementwise quantities are to be summed over the row (`summands`), and is given the sums (`apply`).

Letters: R rows of a block, w columns of the shard. Hyperparameters and row-wise state are [R, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# Columns whose summands are added as a tree before the blocks are added in column order. The narrowest column shard.
STATISTICS_BLOCK = 16


class RowHyperparameters(NamedTuple):
    """Hyperparameters of each row of a block, and the number of the update (from 1). See `Slots`."""

    learning_rate: Float[Array, "R 1"]
    weight_decay: Float[Array, "R 1"]
    eps: Float[Array, "R 1"]
    beta1: Float[Array, "R 1"]
    beta2: Float[Array, "R 1"]
    dim: Float[Array, "R 1"]
    step: Float[Array, ""]


class RowValues(NamedTuple):
    """Weights and optimizer state of a block of rows, in float32.

    Attributes:
        weights: The rows.
        element_state: State of one number an element, in the order of `RowOptimizer.element_state`.
        row_state: State of one number a row, in the order of `RowOptimizer.row_state`.
    """

    weights: Float[Array, "R w"]
    element_state: tuple[Float[Array, "R w"], ...]
    row_state: tuple[Float[Array, "R 1"], ...]


Statistics = tuple[Float[Array, "R 1"], ...]
Summands = Callable[[RowValues, Float[Array, "R w"], RowHyperparameters], tuple[Float[Array, "R w"], ...]]
Apply = Callable[[RowValues, Float[Array, "R w"], RowHyperparameters, Statistics], RowValues]


class RowOptimizer(NamedTuple):
    """An update rule.

    Attributes:
        name: Name of the rule.
        element_state: Names of the state of one number an element.
        row_state: Names of the state of one number a row.
        statistics: Names of the sums over the whole row that `apply` needs.
        summands: The elementwise quantities that they are sums of.
        apply: New values from old values, gradient, hyperparameters and those sums.
    """

    name: str
    element_state: tuple[str, ...]
    row_state: tuple[str, ...]
    statistics: tuple[str, ...]
    summands: Summands
    apply: Apply


def sum_columns(x: Float[Array, "R w"]) -> Float[Array, "R blocks"]:
    """Sums blocks of 16 columns, each as a balanced tree, so that a column shard adds the same bits as a whole row."""
    block = min(STATISTICS_BLOCK, x.shape[1])
    x = x.reshape(x.shape[0], x.shape[1] // block, block)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def sum_blocks(x: Float[Array, "R blocks"]) -> Float[Array, "R 1"]:
    """Adds the blocks of a row in column order."""
    total = x[:, :1]
    for block in range(1, x.shape[1]):
        total = total + x[:, block : block + 1]
    return total


def _no_summands(rows: RowValues, gradient: Float[Array, "R w"], hyper: RowHyperparameters) -> tuple[()]:
    return ()


def _decayed(rows: RowValues, gradient: Float[Array, "R w"], hyper: RowHyperparameters) -> Float[Array, "R w"]:
    return gradient + hyper.weight_decay * rows.weights


def _mean_square_summands(
    rows: RowValues, gradient: Float[Array, "R w"], hyper: RowHyperparameters
) -> tuple[Float[Array, "R w"]]:
    return (jnp.square(_decayed(rows, gradient, hyper)),)


def sgd() -> RowOptimizer:
    """Stochastic gradient descent: ``w -= lr * (g + decay * w)``."""

    def apply(rows, gradient, hyper, statistics):
        del statistics
        return rows._replace(weights=rows.weights - hyper.learning_rate * _decayed(rows, gradient, hyper))

    return RowOptimizer("sgd", (), (), (), _no_summands, apply)


def adagrad() -> RowOptimizer:
    """AdaGrad (Duchi et al. 2011), element-wise, with G = g + decay * w.

    ``m += G**2``, ``w -= lr * G / (sqrt(m) + eps)``. State: m, one number an element.
    """

    def apply(rows, gradient, hyper, statistics):
        del statistics
        gradient = _decayed(rows, gradient, hyper)
        moment = rows.element_state[0] + jnp.square(gradient)
        weights = rows.weights - hyper.learning_rate * gradient / (jnp.sqrt(moment) + hyper.eps)
        return RowValues(weights, (moment,), ())

    return RowOptimizer("adagrad", ("sum_of_squares",), (), (), _no_summands, apply)


def rowwise_adagrad() -> RowOptimizer:
    """Row-wise AdaGrad (Mudigere et al. 2022; FBGEMM's EXACT_ROWWISE_ADAGRAD), with G = g + decay * w.

    ``m += mean_j(G_j**2)``, ``w -= lr * G / (sqrt(m) + eps)``. State: m, one number a row.
    """

    def apply(rows, gradient, hyper, statistics):
        gradient = _decayed(rows, gradient, hyper)
        moment = rows.row_state[0] + statistics[0] / hyper.dim
        weights = rows.weights - hyper.learning_rate * gradient / (jnp.sqrt(moment) + hyper.eps)
        return RowValues(weights, (), (moment,))

    return RowOptimizer(
        "rowwise_adagrad", (), ("sum_of_mean_squares",), ("squared_gradient",), _mean_square_summands, apply
    )


def _moved(moment: Float[Array, "R _"], new: Float[Array, "R _"], beta: Float[Array, "R 1"]) -> Float[Array, "R _"]:
    """``beta * moment + (1 - beta) * new``.

    With one product only: of two, a compiler fuses either one with the sum, and which one changes the last bit.
    """
    return moment + (1.0 - beta) * (new - moment)


def _corrected(moment: Float[Array, "R _"], beta: Float[Array, "R 1"], step: Float[Array, ""]) -> Float[Array, "R _"]:
    return moment / (1.0 - jnp.power(beta, step))


def adam() -> RowOptimizer:
    """Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019), at update t.

    ``m = b1*m + (1-b1)*g``, ``v = b2*v + (1-b2)*g**2``,
    ``w -= lr * (m / (1-b1**t) / (sqrt(v / (1-b2**t)) + eps) + decay * w)``. State: m and v, one number an element.
    """

    def apply(rows, gradient, hyper, statistics):
        del statistics
        moments, update = _adam_update(rows, gradient, hyper)
        return RowValues(rows.weights - hyper.learning_rate * update, moments, ())

    return RowOptimizer("adam", ("first_moment", "second_moment"), (), (), _no_summands, apply)


def _adam_update(
    rows: RowValues, gradient: Float[Array, "R w"], hyper: RowHyperparameters
) -> tuple[tuple[Float[Array, "R w"], Float[Array, "R w"]], Float[Array, "R w"]]:
    first = _moved(rows.element_state[0], gradient, hyper.beta1)
    second = _moved(rows.element_state[1], jnp.square(gradient), hyper.beta2)
    root = jnp.sqrt(_corrected(second, hyper.beta2, hyper.step))
    direction = _corrected(first, hyper.beta1, hyper.step) / (root + hyper.eps)
    return (first, second), direction + hyper.weight_decay * rows.weights


def partial_rowwise_adam() -> RowOptimizer:
    """Adam whose second moment is one number a row (FBGEMM's PARTIAL_ROWWISE_ADAM), at update t.

    ``m = b1*m + (1-b1)*g``, ``v = b2*v + (1-b2)*mean_j(g_j**2)``,
    ``w -= lr * (m / (1-b1**t) / (sqrt(v / (1-b2**t)) + eps) + decay * w)``. State: m an element, v a row.
    """

    def summands(rows, gradient, hyper):
        del rows, hyper
        return (jnp.square(gradient),)

    def apply(rows, gradient, hyper, statistics):
        first = _moved(rows.element_state[0], gradient, hyper.beta1)
        second = _moved(rows.row_state[0], statistics[0] / hyper.dim, hyper.beta2)
        root = jnp.sqrt(_corrected(second, hyper.beta2, hyper.step))
        direction = _corrected(first, hyper.beta1, hyper.step) / (root + hyper.eps)
        update = direction + hyper.weight_decay * rows.weights
        return RowValues(rows.weights - hyper.learning_rate * update, (first,), (second,))

    return RowOptimizer(
        "partial_rowwise_adam", ("first_moment",), ("second_moment",), ("squared_gradient",), summands, apply
    )


def lamb() -> RowOptimizer:
    """LAMB (You et al. 2020), each row being a layer, with u Adam's update (weight decay included).

    ``w -= lr * (norm(w) / norm(u)) * u``, the ratio being 1 where either norm is 0. State: m and v, an element each.
    """

    def summands(rows, gradient, hyper):
        _, update = _adam_update(rows, gradient, hyper)
        return jnp.square(rows.weights), jnp.square(update)

    def apply(rows, gradient, hyper, statistics):
        moments, update = _adam_update(rows, gradient, hyper)
        weight_norm, update_norm = jnp.sqrt(statistics[0]), jnp.sqrt(statistics[1])
        defined = (weight_norm > 0) & (update_norm > 0)
        ratio = jnp.where(defined, weight_norm / jnp.where(defined, update_norm, 1.0), 1.0)
        return RowValues(rows.weights - hyper.learning_rate * ratio * update, moments, ())

    return RowOptimizer(
        "lamb", ("first_moment", "second_moment"), (), ("squared_weights", "squared_update"), summands, apply
    )


ROW_OPTIMIZERS: dict[str, RowOptimizer] = {
    rule.name: rule for rule in (sgd(), adagrad(), rowwise_adagrad(), adam(), partial_rowwise_adam(), lamb())
}
