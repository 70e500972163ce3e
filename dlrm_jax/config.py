"""Config: everything that an experiment is, and how it meets a dataset card."""

import dataclasses
import math
from typing import Any, Literal, get_args

from dlrm_jax.config_types import check_types
from dlrm_jax.data.card import DatasetCard, SparseColumn
from dlrm_jax.model import ModelConfig
from dlrm_jax.schedules import ScheduleConfig
from pallas_kernels.implementations import Implementation
from pallas_kernels.rounding import Rounding
from sharding.all_reduce import AllReduce
from sharding.codec import Codec
from sharding.errors import InputError
from sharding.tables import RULE_LIMITS, FeatureSpec, Initializer, Pooling, RowOptimizerName, StorageDtype, TableSpec

BatchSize = Literal["batch_size", "eval_batch_size"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples, in which order and portions."""

    path: str | None = None
    """Folder of the dataset (see docs/data.md). None: random batches that follow the config's own card."""
    batch_size: int = 512
    """Samples of one training step, over all devices."""
    eval_batch_size: int = 4096
    """Samples of one evaluation step."""
    virtual_shards: int = 64
    """Parts that an epoch is dealt to; a batch takes as many samples from each, so it divides both batch sizes."""
    shuffle_window: int = 262_144
    """Samples among which the order is random, after row groups have been shuffled."""
    prefetch: int = 2
    """Batches made ready ahead of the step."""
    threads: int = 2
    """Threads that read row groups."""

    def next_batch_size(self, size: int, num_devices: int) -> int:
        """The smallest batch size, from a given one on, that virtual shards and devices divide.

        Args:
            size: The given one.
            num_devices: Devices.
        """
        both = math.lcm(self.virtual_shards, num_devices)
        return -(-size // both) * both

    def check_devices(self, name: BatchSize, num_devices: int) -> None:
        """Raises InputError unless so many devices divide the samples of a batch, given by its name here."""
        size = getattr(self, name)
        if size % num_devices:
            raise InputError(
                f"data.{name} is {size}, which {num_devices} devices do not divide: use "
                f"{self.next_batch_size(size, num_devices)}, or another number of devices"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices that train together, of all processes. May change when a run is resumed."""

    nodes: int = 1
    """Groups of devices with fast links inside, such as machines."""
    chips: int = 1
    """Devices of each."""

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.nodes * self.chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Settings of an embedding table; its rows come from the dataset card."""

    dim: int = 16
    """Columns."""
    optimizer: RowOptimizerName = "rowwise_adagrad"
    """Update rule, applied once a step to each row that the batch touches (pallas_kernels/row_optimizers.py)."""
    learning_rate: float = 0.01
    """Learning rate, before the schedule's multiplier."""
    weight_decay: float = 0.0
    """Weight decay of touched rows: added to the gradient (sgd, adagrad, rowwise_adagrad) or decoupled (the others)."""
    eps: float = 1e-8
    """Added to the square root in the rule's denominator."""
    beta1: float = 0.9
    """Decay of the first moment (Adam, LAMB)."""
    beta2: float = 0.999
    """Decay of the second moment (Adam, LAMB)."""
    initializer: Initializer = Initializer()
    """How rows begin."""
    initial_values: str | None = None
    """A .npy file of [rows, dim] that rows begin with instead."""
    frozen: bool = False
    """Rows never change."""
    dtype: StorageDtype = "float32"
    """How weights are stored; optimizer state is float32."""
    rounding: Rounding = "nearest"
    """How an update is rounded to a bfloat16 or float16 table; or, for bfloat16, "split": its low half is kept, too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Which features are embedded, in which tables, pooled how."""

    default: TableConfig = TableConfig()
    """Settings of every table that `tables` does not name."""
    tables: dict[str, TableConfig] = dataclasses.field(default_factory=dict)
    """Tables with settings of their own, by name."""
    shared: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Tables that several features share: name of the table, then the features. Any other feature has a table of its
    own name. A shared table has the rows of its largest feature. Repeat the flag for another table."""
    default_pooling: Pooling = "sum"
    """Pooling of every feature that `pooling` does not name. Sequences ("none") are for models of your own."""
    pooling: dict[str, Pooling] = dataclasses.field(default_factory=dict)
    """Pooling by feature."""
    features: tuple[str, ...] = ()
    """Sparse features to use; empty: all that the dataset card has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How embeddings are written while they travel between devices (sharding/codec.py). One device sends nothing."""

    forward: Codec = "float32"
    """Vectors, from the tables to the samples."""
    backward: Codec = "float32"
    """Their gradients, from the samples to the tables."""
    all_reduce: AllReduce = "float32"
    """Gradients of the dense part. bfloat16_feedback: what rounding takes is added to the next step's gradients."""


DenseOptimizerName = Literal["sgd", "adagrad", "adam", "adamw", "lamb"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """How the MLPs learn (optax)."""

    name: DenseOptimizerName = "adagrad"
    """Update rule."""
    learning_rate: float = 0.01
    """Learning rate, before the schedule's multiplier."""
    weight_decay: float = 0.0
    """Weight decay: decoupled for adamw and lamb, added to the gradient for the others."""
    momentum: float = 0.0
    """Momentum of sgd."""
    beta1: float = 0.9
    """Decay of the first moment (Adam, LAMB)."""
    beta2: float = 0.999
    """Decay of the second moment (Adam, LAMB)."""
    eps: float = 1e-8
    """Added to the denominator (adagrad: under the root)."""
    clip_norm: float | None = None
    """Largest norm of the dense gradients together; larger ones are scaled down. None: no limit."""


BestBy = Literal["ne", "auc"]
PipelineKind = Literal["none", "route", "stale"]
OrderBy = Literal["estimates", "compiler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write meanwhile. May change when a run is resumed, but for what is judged by.

    Neither may `pipeline` change to "stale" or back.
    """

    epochs: int = 1
    """Passes over the training split."""
    max_steps: int | None = None
    """Stop after so many steps, even within an epoch."""
    eval_split: str | None = "validation"
    """Split evaluated during training and judged by; never the one you report. None: no evaluation."""
    eval_every: int | None = None
    """Steps between evaluations; always one at the end of an epoch. None: only there."""
    early_stop: int | None = None
    """Stop after so many evaluations in a row without a better one. None: never."""
    best_by: BestBy = "ne"
    """What makes an evaluation better: lower NE or higher AUC."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl and TensorBoard; the metrics are those of the steps since the last line, or
    since the checkpoint that the run went on from."""
    checkpoint_every: int | None = 1000
    """Steps between checkpoints. None: only where evaluation finds the best so far, and at the end."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept beside the best."""
    pipeline: PipelineKind = "route"
    """What of the next batch is done while a batch computes. route: its ids travel to their rows, which changes no bit
    of the results. stale: its rows are also looked up, before the batch's update, which changes results: each step
    trains on embeddings that lack the last update. none: nothing. A resumed run cannot change to stale or back."""
    chunks: int | None = None
    """Parts of each device's samples whose embeddings travel while another part computes; they divide its samples.
    None: as many as the cost model says, which is one on hosts. Changes the speed, and sums in the last bit."""
    order_by: OrderBy = "estimates"
    """On several GPUs, whose figures order a step's exchanges and arithmetic. estimates: ours, which hide more of the
    exchanges; the step is compiled twice. compiler: XLA's. Changes the speed alone."""
    profile: int | None = None
    """Steps to trace soon after the start, into workdir/profile, for TensorBoard and Perfetto. None: none. They begin
    after the three that compile, where so many steps follow these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment. Files in configs/ return one; the command line overrides its fields."""

    name: str
    """Name of the experiment."""
    workdir: str = "runs/default"
    """Folder of checkpoints, metrics and pictures. A folder that holds a run is resumed."""
    seed: int = 0
    """Seed of parameters, tables and the order of samples."""
    mesh: MeshConfig = MeshConfig()
    plan: str | None = None
    """File of a sharding plan (scripts/plan.py makes one). None: the planner's. May change when a run is resumed."""
    kernels: Implementation | None = None
    """Implementation of lookups and updates. None: the best for the device. May change when a run is resumed."""
    data: DataConfig = DataConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    model: ModelConfig
    dense_optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    stated: DatasetCard | None = None
    """What the features are where there is no dataset."""

    def __post_init__(self):
        """Refuses settings that contradict themselves."""
        check_types(self)
        counts = {
            "mesh": ("nodes", "chips"),
            "data": ("batch_size", "eval_batch_size", "virtual_shards", "shuffle_window", "prefetch", "threads"),
            "train": (
                *("epochs", "max_steps", "eval_every", "early_stop", "log_every"),
                *("checkpoint_every", "keep_checkpoints", "chunks", "profile"),
            ),
        }
        for part, names in counts.items():
            for name in names:
                value = getattr(getattr(self, part), name)
                if value is not None and value < 1:
                    raise InputError(f"{part}.{name} is {value}, but must be at least 1: raise it")
        for name in ("batch_size", "eval_batch_size"):
            size, shards = getattr(self.data, name), self.data.virtual_shards
            if size % shards:
                raise InputError(
                    f"data.{name} is {size}, which data.virtual_shards {shards} does not divide: "
                    f"use {self.data.next_batch_size(size, self.mesh.num_devices)}, or another number of virtual shards"
                )
        for name, value, choices in (
            ("kernels", self.kernels, (None, *get_args(Implementation))),
            ("exchange.forward", self.exchange.forward, get_args(Codec)),
            ("exchange.backward", self.exchange.backward, get_args(Codec)),
            ("exchange.all_reduce", self.exchange.all_reduce, get_args(AllReduce)),
            ("dense_optimizer.name", self.dense_optimizer.name, get_args(DenseOptimizerName)),
            ("train.best_by", self.train.best_by, get_args(BestBy)),
            ("train.pipeline", self.train.pipeline, get_args(PipelineKind)),
            ("train.order_by", self.train.order_by, get_args(OrderBy)),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}, which is not known: use one of {', '.join(map(str, choices))}")
        for name, (low, high) in {**RULE_LIMITS, "momentum": RULE_LIMITS["beta1"]}.items():
            value = getattr(self.dense_optimizer, name)
            if not low <= value <= high:
                raise InputError(
                    f"dense_optimizer.{name} is {value}, but must be at least {low} and at most {high}: change it"
                )
        clip, (_, largest) = self.dense_optimizer.clip_norm, RULE_LIMITS["learning_rate"]
        if clip is not None and not 0 < clip <= largest:
            raise InputError(
                f"dense_optimizer.clip_norm is {clip}, but must be above 0 and at most {largest}: change it or leave "
                "it out"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, but must be at least 0 and below 2**32: choose another")

    def identity(self) -> dict[str, Any]:
        """The settings that a run cannot change when it is resumed, by dotted name.

        Folder names, devices, plan and kernels, what is read ahead, and everything of `train` but what scores are
        compared by and whether embeddings are stale may change; the dataset itself is compared by its card and the row
        groups of its training files, not by where it lies.
        """
        free = {"workdir", "stated", "data.path", "data.prefetch", "data.threads", "data.eval_batch_size"}
        free |= {"mesh.nodes", "mesh.chips", "plan", "kernels"}
        fixed = {"train.eval_split", "train.best_by"}
        flat = flatten(dataclasses.asdict(self))
        identity = {
            name: value
            for name, value in flat.items()
            if name in fixed or (name not in free and not name.startswith("train."))
        }
        # The other ways have the same results.
        return identity | ({"train.pipeline": "stale"} if self.train.pipeline == "stale" else {})

    def facts(self) -> dict[str, Any]:
        """The settings that all processes of a job must share, by dotted name: all but those of a machine."""
        own = {"data.path", "data.prefetch", "data.threads"}
        return {name: value for name, value in flatten(dataclasses.asdict(self)).items() if name not in own}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as one, by dotted name, without the stated card.

    Args:
        tree: The tree.
        prefix: Before each name.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in flat.items() if not name.startswith("stated.")}


def used_features(config: EmbeddingConfig, card: DatasetCard) -> tuple[SparseColumn, ...]:
    """The card's features that the config uses.

    Args:
        config: The config.
        card: The dataset card.

    Returns:
        Columns, in the config's order, or the card's where the config names none.

    Raises:
        InputError: A feature named anywhere in the config that the card does not have or the config does not use.
    """
    used = tuple(card.feature(name) for name in config.features) if config.features else card.sparse
    if not used:
        raise InputError(f"dataset {card.name!r} has no sparse features; a DLRM embeds at least one")
    names = {column.name for column in used}
    mentioned = {"embedding.pooling": set(config.pooling)}
    mentioned |= {f"embedding.shared.{table}": set(features) for table, features in config.shared.items()}
    for field, features in mentioned.items():
        if unknown := sorted(features - names):
            fix = "" if field == "embedding.pooling" else "; another table takes another --embedding.shared"
            raise InputError(
                f"{field} names {unknown[0]!r}, which is not a feature in use; those are {sorted(names)}{fix}"
            )
    return used


def make_specs(config: EmbeddingConfig, card: DatasetCard) -> tuple[tuple[TableSpec, ...], tuple[FeatureSpec, ...]]:
    """What the config and the card say together about tables and features.

    Args:
        config: Settings of tables, and who shares them.
        card: Rows, bags and pooling factors.

    Returns:
        Specifications of tables and of features.

    Raises:
        InputError: Settings for a table that no feature uses, or a feature in two tables.
    """
    columns = used_features(config, card)
    table_of: dict[str, str] = {}
    for table, members in config.shared.items():
        for member in members:
            if member in table_of:
                raise InputError(
                    f"feature {member!r} is in the shared tables {table_of[member]!r} and {table!r}; keep one"
                )
            table_of[member] = table
    rows: dict[str, int] = {}
    features = []
    for column in columns:
        table = table_of.get(column.name, column.name)
        rows[table] = max(rows.get(table, 0), column.num_rows)
        features.append(
            FeatureSpec(
                name=column.name,
                table=table,
                pooling=config.pooling.get(column.name, config.default_pooling),
                max_ids=column.max_pooling_factor,
            )
        )
    unused = sorted(set(config.tables) - set(rows))
    if unused:
        raise InputError(f"embedding.tables names {unused[0]!r}, which no feature uses; tables are {sorted(rows)}")
    tables = []
    for name, num_rows in rows.items():
        settings = config.tables.get(name, config.default)
        fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        tables.append(TableSpec(name=name, num_rows=num_rows, **fields))
    return tuple(tables), tuple(features)
