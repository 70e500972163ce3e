"""The update rules of `row_optimizers`, and rounding, traced for the kernels of `mosaic_gpu` and `sparsecore`.

Those cannot raise to a power, and need not: rules do so with hyperparameters only, so those powers are computed outside
the kernel, once a slot. Nor do they know finite numbers when they see them, but they can compare; nor, on a SparseCore,
squares, but they can multiply. Everything else is traced in the kernel as it is written.

Letters: S slots, w columns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.row_optimizers import RowHyperparameters, RowOptimizer, RowValues
from pallas_kernels.slots import Slots

_Power = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedRule:
    """A rule as two programs of one row, [w]; hyperparameters, row-wise state and statistics are scalars.

    Attributes:
        optimizer: The rule.
        used: Numbers of the hyperparameters that it reads.
    """

    optimizer: RowOptimizer
    used: tuple[int, ...]
    _summands: jex.Jaxpr
    _apply: jex.Jaxpr
    _new_values: jax.tree_util.PyTreeDef

    @property
    def num_statistics(self) -> int:
        """Statistics that it needs of a row."""
        return len(self.optimizer.statistics)

    def scalars_of_slots(self, slots: Slots, step: Float[Array, ""]) -> Float[Array, "S h"]:
        """The hyperparameters of each slot that the rule reads, then the powers of them that it asks for."""
        hyper = (slots.learning_rate, slots.weight_decay, slots.eps, slots.beta1, slots.beta2, slots.dim)
        hyper = (*hyper, jnp.broadcast_to(step, slots.dim.shape))

        def powers(*hyper: Float[Array, ""]) -> list[Float[Array, ""]]:
            found: list[Float[Array, ""]] = []

            def remember(base: Float[Array, ""] | None, exponent: Float[Array, ""] | None) -> Float[Array, ""]:
                if base is None or exponent is None:
                    raise NotImplementedError(f"{self.optimizer.name}: a power of something that is no hyperparameter")
                found.append(lax.pow(base, exponent))
                return found[-1]

            for program in (self._summands, self._apply):
                _evaluate(program, self._arguments(program, hyper), remember)
            return found

        return jnp.stack([*[hyper[i] for i in self.used], *jax.vmap(powers)(*hyper)], axis=1)

    def _arguments(self, program: jex.Jaxpr, hyper: Sequence[Any]) -> list[Any]:
        """The arguments of a program of which only the hyperparameters are known."""
        before = _arguments_before_hyperparameters(self.optimizer)
        return [*[None] * before, *hyper, *[None] * (len(program.jaxpr.invars) - before - len(hyper))]

    def summands(
        self, values: RowValues, gradient: Float[Array, " w"], scalars: Sequence[Float[Array, ""]]
    ) -> list[Float[Array, " w"]]:
        """`RowOptimizer.summands` of one row, given the scalars of its slot."""
        hyper, powers = self._split(scalars, after=None)
        return _evaluate(self._summands, [*jax.tree.leaves(values), gradient, *hyper], powers)

    def apply(
        self,
        values: RowValues,
        gradient: Float[Array, " w"],
        scalars: Sequence[Float[Array, ""]],
        statistics: Sequence[Float[Array, ""]],
    ) -> RowValues:
        """`RowOptimizer.apply` of one row, given the scalars of its slot."""
        hyper, powers = self._split(scalars, after=self._summands)
        new = _evaluate(self._apply, [*jax.tree.leaves(values), gradient, *hyper, *statistics], powers)
        return jax.tree.unflatten(self._new_values, new)

    def _split(self, scalars: Sequence[Array], after: jex.Jaxpr | None) -> tuple[Sequence[Any], _Power]:
        """Hyperparameters, and what gives a program its powers one after the other."""
        hyper: list[Any] = [None] * len(RowHyperparameters._fields)
        for number, scalar in zip(self.used, scalars, strict=False):
            hyper[number] = scalar
        skipped = 0 if after is None else _count_powers(after.jaxpr)
        powers = iter(scalars[len(self.used) + skipped :])
        return hyper, lambda *_: next(powers)


def trace_rule(optimizer: RowOptimizer, columns: int, *, scalar: tuple[int, ...] = ()) -> TracedRule:
    """Traces a rule for rows of so many columns, and for scalars of that shape: () or, repeated, (columns,)."""
    row: Any = jax.ShapeDtypeStruct((columns,), jnp.float32)
    number: Any = jax.ShapeDtypeStruct(scalar, jnp.float32)
    values = RowValues(
        weights=row,
        element_state=tuple(row for _ in optimizer.element_state),
        row_state=tuple(number for _ in optimizer.row_state),
    )
    hyper = RowHyperparameters(*[number for _ in RowHyperparameters._fields])
    summands = jax.make_jaxpr(optimizer.summands)(values, row, hyper)
    statistics = tuple(number for _ in optimizer.statistics)
    apply, new_values = jax.make_jaxpr(optimizer.apply, return_shape=True)(values, row, hyper, statistics)
    return TracedRule(
        optimizer=optimizer,
        used=_used_hyperparameters(optimizer, summands, apply),
        _summands=summands,
        _apply=apply,
        _new_values=jax.tree.structure(new_values),
    )


def _arguments_before_hyperparameters(optimizer: RowOptimizer) -> int:
    """Weights, state and gradient."""
    return 2 + len(optimizer.element_state) + len(optimizer.row_state)


def _used_hyperparameters(optimizer: RowOptimizer, *programs: jex.Jaxpr) -> tuple[int, ...]:
    first = _arguments_before_hyperparameters(optimizer)
    used = set()
    for program in programs:
        # A power is not taken in the kernel, so its arguments are not needed there.
        read = {id(atom) for eqn in program.jaxpr.eqns if eqn.primitive is not lax.pow_p for atom in eqn.invars}
        hyper = program.jaxpr.invars[first : first + len(RowHyperparameters._fields)]
        used |= {number for number, variable in enumerate(hyper) if id(variable) in read}
    return tuple(sorted(used))


def without_is_finite(function: Callable[..., Array], *arguments: Array) -> Array:
    """What a function returns, in a kernel that lacks `jax.numpy.isfinite`."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    return _evaluate(jax.make_jaxpr(function)(*shapes), arguments, lax.pow)[0]


def _count_powers(jaxpr: jex.Jaxpr) -> int:
    inner = sum(_count_powers(eqn.params["jaxpr"].jaxpr) for eqn in jaxpr.eqns if "jaxpr" in eqn.params)
    return inner + sum(eqn.primitive is lax.pow_p for eqn in jaxpr.eqns)


def _evaluate(program: jex.Jaxpr, arguments: Sequence[Any], power: _Power) -> list[Any]:
    """Runs a program with another way to raise to a power. What depends on an unknown argument (None) is unknown."""
    known: dict[jex.Var, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    known.update(zip(program.jaxpr.invars, arguments, strict=True))

    def read(atom: jex.Var | jex.Literal) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    for eqn in program.jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if "jaxpr" in eqn.params:
            outputs = _evaluate(eqn.params["jaxpr"], inputs, power)
        elif eqn.primitive is lax.pow_p:
            outputs = [power(*inputs)]
        elif any(x is None for x in inputs):
            outputs = [None] * len(eqn.outvars)
        elif eqn.primitive is lax.is_finite_p:
            outputs = [abs(inputs[0]) < jnp.inf]
        elif eqn.primitive is lax.square_p:
            outputs = [inputs[0] * inputs[0]]
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in program.jaxpr.outvars]
