"""TableSpec and FeatureSpec: what is to be embedded, without a word on where it lives."""

import dataclasses
import math
import os
import zlib
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

from pallas_kernels.rounding import Rounding, draws_bits
from pallas_kernels.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from sharding.errors import InputError, check_type

Pooling = Literal["sum", "mean", "none"]
StorageDtype = Literal["float32", "bfloat16", "float16"]
InitializerKind = Literal["uniform", "normal", "constant"]
RowOptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"]

MAX_ROWS = 2**63 - 1
MAX_IDS = 2**31 - 1
# The largest settings that float32 holds, and the largest below 1.
_LARGEST = 3e38
_LARGEST_FLOAT16 = 65504.0
_BELOW_ONE = 1.0 - 2.0**-24
# What settings of update rules may be.
RULE_LIMITS = {
    "learning_rate": (0.0, _LARGEST),
    "weight_decay": (0.0, _LARGEST),
    # Above 0, or a gradient of 0 divides 0 by 0.
    "eps": (1e-30, _LARGEST),
    "beta1": (0.0, _BELOW_ONE),
    "beta2": (0.0, _BELOW_ONE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializer:
    """How the rows of a table begin: a function of (seed, table, row, column), whatever the plan.

    Attributes:
        kind: "uniform": in [-scale, scale); "normal": of mean 0 and standard deviation scale; "constant": scale.
        scale: See kind. None means ``1 / sqrt(num_rows)`` (the DLRM reference's choice for uniform) for the first two
            and 0 for a constant.
    """

    kind: InitializerKind = "uniform"
    scale: float | None = None

    def scale_for(self, num_rows: int) -> float:
        """The scale for a table of so many rows."""
        if self.scale is not None:
            return self.scale
        return 0.0 if self.kind == "constant" else 1.0 / math.sqrt(num_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """An embedding table.

    Attributes:
        name: Name, unique among tables.
        num_rows: Rows; ids lie in [0, num_rows).
        dim: Columns.
        dtype: How weights are stored; sums and updates are float32, and so is optimizer state.
        rounding: How an update is rounded to a bfloat16 or float16 table: "nearest" or "stochastic". Or "split", for
            bfloat16: the low 16 bits of each float32 weight are kept beside the table, lookups read the high ones, and
            updates are those of float32.
        optimizer: Update rule, see `pallas_kernels.row_optimizers`.
        learning_rate: Learning rate, before the schedule's multiplier.
        weight_decay: Weight decay; the rule says how it enters.
        eps: Added to the square root in the rule's denominator.
        beta1: Decay of the first moment (Adam, LAMB).
        beta2: Decay of the second moment (Adam, LAMB).
        initializer: How rows begin.
        frozen: Rows never change; no optimizer state is kept.
        initial_values: A .npy file of [num_rows, dim] that rows begin with instead. Training reads it as a run starts.
            `ShardedTables.init` does not: give its state to `sharding.checkpoint.load_initial_values`.
    """

    name: str
    num_rows: int
    dim: int
    dtype: StorageDtype = "float32"
    rounding: Rounding = "nearest"
    optimizer: RowOptimizerName = "rowwise_adagrad"
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    initializer: Initializer = Initializer()
    frozen: bool = False
    initial_values: str | os.PathLike[str] | None = None

    @property
    def stable_id(self) -> int:
        """A number below 2**32 that depends on the name alone."""
        return zlib.crc32(self.name.encode())

    @property
    def rule(self) -> RowOptimizer | None:
        """The update rule; None for a frozen table."""
        return None if self.frozen else ROW_OPTIMIZERS[self.optimizer]

    @property
    def draws_bits(self) -> bool:
        """Whether updates take random bits."""
        return not self.frozen and draws_bits(self.rounding, self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """A sparse feature: whose ids are looked up in which table, and what becomes of a bag's rows.

    With x_i the rows and v_i the weights (1 where there are none) of the ids of a bag:

    - "sum": ``sum_i v_i x_i``;
    - "mean": ``sum_i v_i x_i / sum_i v_i``, so without weights the sum over the number of ids; zeros where the
      denominator is 0. (FBGEMM divides a weighted mean by the number of ids instead.)
    - "none": the rows ``v_i x_i`` themselves, in order, as a sequence padded with zeros to ``max_ids``.

    Gradients flow to rows, not to the weights of ids.

    Attributes:
        name: Name, unique among features.
        table: Name of its table; several features may share one.
        pooling: See above.
        max_ids: Most ids in one bag: required where pooling is "none"; elsewhere it lets buffers be smaller.
    """

    name: str
    table: str
    pooling: Pooling = "sum"
    max_ids: int | None = None


def check_specs(tables: Sequence[TableSpec], features: Sequence[FeatureSpec]) -> None:
    """Raises InputError unless names are unique, features have tables, and every figure is within its limits.

    Args:
        tables: All tables.
        features: All features.
    """
    for kind, specs, spec_type in (("table", tables, TableSpec), ("feature", features, FeatureSpec)):
        for spec in specs:
            check_type(spec, spec_type, f"{kind} {spec!r}")
    for kind, names in (("table", [t.name for t in tables]), ("feature", [f.name for f in features])):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InputError(f"{kind} {repeated[0]!r} is declared twice; names must differ")
    if not features:
        raise InputError("no feature is declared; an embedding layer needs at least one")
    by_name = {table.name: table for table in tables}
    for feature in features:
        if feature.table not in by_name:
            raise InputError(f"feature {feature.name!r} is mapped to table {feature.table!r}; tables: {list(by_name)}")
        if feature.pooling not in get_args(Pooling):
            raise InputError(
                f"feature {feature.name!r}: pooling {feature.pooling!r} is not one of {', '.join(get_args(Pooling))}"
            )
        if feature.pooling == "none" and feature.max_ids is None:
            raise InputError(f"feature {feature.name!r} is unpooled, so max_ids must say how long a sequence can be")
        if not isinstance(feature.max_ids, Integral | None):
            raise InputError(f"feature {feature.name!r}: max_ids is {feature.max_ids!r}, but must be a whole number")
        if feature.max_ids is not None and not 1 <= feature.max_ids <= MAX_IDS:
            raise InputError(f"feature {feature.name!r} has max_ids {feature.max_ids}; the limit is 1 to {MAX_IDS}")
    unused = sorted(set(by_name) - {feature.table for feature in features})
    if unused:
        raise InputError(f"table {unused[0]!r} is used by no feature; leave it out or map a feature to it")
    for table in tables:
        _check_table(table)


def _check_table(table: TableSpec) -> None:
    where = f"table {table.name!r}"
    for field, number in (("num_rows", table.num_rows), ("dim", table.dim)):
        if not isinstance(number, Integral):
            raise InputError(f"{where}: {field} is {number!r}, but must be a whole number")
    if not 1 <= table.num_rows <= MAX_ROWS:
        raise InputError(f"{where} has {table.num_rows} rows; the limit is 1 to {MAX_ROWS}")
    if not 1 <= table.dim <= 8192:
        raise InputError(f"{where} has dim {table.dim}; the limit is 1 to 8192")
    if table.optimizer not in ROW_OPTIMIZERS:
        raise InputError(f"{where}: optimizer {table.optimizer!r} does not exist; there are {list(ROW_OPTIMIZERS)}")
    if not isinstance(table.initializer, Initializer):
        raise InputError(f"{where}: initializer is {table.initializer!r}; give an Initializer, such as Initializer()")
    for field, value, choices in (
        ("dtype", table.dtype, get_args(StorageDtype)),
        ("rounding", table.rounding, get_args(Rounding)),
        ("initializer", table.initializer.kind, get_args(InitializerKind)),
    ):
        if value not in choices:
            raise InputError(f"{where}: {field} {value!r} is not one of {', '.join(choices)}")
    if table.rounding == "split" and table.dtype != "bfloat16":
        raise InputError(
            f"{where}: rounding split keeps the high halves of weights in bfloat16, but the dtype is {table.dtype}; "
            "use bfloat16"
        )
    most = _LARGEST_FLOAT16 if table.dtype == "float16" else _LARGEST
    if not abs(table.initializer.scale_for(table.num_rows)) <= most:
        raise InputError(
            f"{where}: the initializer's scale is {table.initializer.scale}; it must be finite in {table.dtype}, so at "
            f"most {most}"
        )
    for field, (low, high) in RULE_LIMITS.items():
        value = getattr(table, field)
        if not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{where}: {field} is {value!r}; it must be at least {low} and at most {high}")
