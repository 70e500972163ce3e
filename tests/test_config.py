"""Configs: they build, and they meet a dataset card."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from configs import CONFIGS
from dlrm_jax.config import (
    Config,
    DataConfig,
    DenseOptimizerConfig,
    EmbeddingConfig,
    ExchangeConfig,
    MeshConfig,
    TableConfig,
    TrainConfig,
    make_specs,
)
from dlrm_jax.config_notes import without_effect
from dlrm_jax.kernel_choice import check_kernels
from dlrm_jax.model import ModelConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import check_parts
from pallas_kernels.target import interpreting
from sharding import Initializer, InputError
from sharding.mesh import make_mesh

CARD = tiny.card()
CARD = tiny.card(sparse=(dataclasses.replace(CARD.sparse[0], vocabulary_digest="11"), *CARD.sparse[1:]))

WRONG_TABLE = TableConfig(dim="8")  # pyright: ignore[reportArgumentType]: what is to be refused


def replaced(config, field, value):
    """The config with another value of the field of that dotted name."""
    name, _, rest = field.partition(".")
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize("name", CONFIGS)
def test_config_when_built_then_it_has_a_name_a_workdir_and_a_docstring_with_the_command(name):
    config = CONFIGS[name]()
    assert config.name == name
    assert config.workdir == f"runs/{name}"
    module = sys.modules[CONFIGS[name].__module__].__doc__ or ""
    assert "scripts/train.py" in module
    assert name in module
    assert CONFIGS[name].__doc__


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("criteo_kaggle", 540_201_232),
        ("criteo_terabyte_mlperf", 26_135_627_264),
        ("dcnv2_mlperf", 26_135_627_264),
        ("reference_random", 512_000_000),
    ],
)
def test_config_when_it_states_its_features_then_a_model_without_parameters_is_made_of_it(name, parameters):
    config = CONFIGS[name]()
    assert config.stated is not None
    recommender = Recommender(config, config.stated)
    assert recommender.num_table_parameters == parameters
    assert recommender.num_dense_parameters > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 0, "data.batch_size is 0, but must be at least 1"),
        ("train.epochs", 1.005, "train.epochs is 1.005, of type float, but must be int: change it"),
        ("train.max_steps", "10", "train.max_steps is '10', of type str, but must be int | None: change it"),
        ("data.batch_size", np.int64(512), "data.batch_size is np.int64(512), of type int64, but must be int"),
        ("train.log_every", True, "train.log_every is True, of type bool, but must be int"),
        ("workdir", Path("runs"), "workdir is PosixPath('runs'), of type PosixPath, but must be str: change it"),
        (
            "dense_optimizer.learning_rate",
            None,
            "dense_optimizer.learning_rate is None, of type NoneType, but must be f",
        ),
        ("embedding.tables", {"a": 16}, "embedding.tables is {'a': 16}, of type dict, but must be dict[str, "),
        ("embedding.tables", {"a": WRONG_TABLE}, "embedding.tables.a.dim is '8', of type str, but must be int"),
        ("embedding.features", "user", "embedding.features is 'user', of type str, but must be tuple[str, ...]"),
        ("embedding", None, "embedding is None, of type NoneType, but must be EmbeddingConfig: change it"),
        ("data.batch_size", 66, "data.batch_size is 66, which data.virtual_shards 4 does not divide: use 68"),
        ("data.eval_batch_size", 2, "data.eval_batch_size is 2, which data.virtual_shards 4 does not divide: use 4"),
        ("train.epochs", 0, "train.epochs is 0"),
        ("train.pipeline", "stal", "train.pipeline is 'stal', which is not known: use one of none, route, stale"),
        ("kernels", "cuda", "kernels is 'cuda', which is not known: use one of None, cpu, mosaic_gpu"),
        ("exchange.forward", "int4", "exchange.forward is 'int4'"),
        ("train.log_every", -1, "train.log_every is -1"),
        ("train.keep_checkpoints", 0, "train.keep_checkpoints is 0"),
        ("dense_optimizer.learning_rate", float("nan"), "dense_optimizer.learning_rate is nan"),
        ("dense_optimizer.clip_norm", 0.0, "dense_optimizer.clip_norm is 0.0"),
        (
            "dense_optimizer.clip_norm",
            float("inf"),
            "dense_optimizer.clip_norm is inf, but must be above 0 and",
        ),
        ("dense_optimizer.name", "adagrd", "dense_optimizer.name is 'adagrd', which is not known: use one of sgd, ada"),
        ("dense_optimizer.beta1", 1.5, "dense_optimizer.beta1 is 1.5, but must be at least 0.0 and at most 0.99999"),
        ("dense_optimizer.beta2", 1.0, "dense_optimizer.beta2 is 1.0, but must be at least 0.0 and at most 0.99999"),
        ("dense_optimizer.momentum", -1.0, "dense_optimizer.momentum is -1.0, but must be at least 0.0 and at most"),
        ("dense_optimizer.weight_decay", -1.0, "dense_optimizer.weight_decay is -1.0, but must be at least 0.0 and"),
        ("dense_optimizer.eps", 0.0, "dense_optimizer.eps is 0.0, but must be at least 1e-30 and at most 3e+38"),
        ("seed", 2**32, "seed is 4294967296"),
        ("schedule.warmup_steps", -1, "schedule.warmup_steps is -1"),
        ("model.top_mlp", (8, 2), "model.top_mlp"),
        ("model.top_mlp", 64, "model.top_mlp is 64, of type int, but must be tuple[int, ...]: change it"),
        ("schedule.warmup_steps", "5", "schedule.warmup_steps is '5', of type str, but must be int"),
    ],
)
def test_config_when_a_setting_is_out_of_its_limits_then_one_line_names_field_value_and_limit(field, value, message):
    with pytest.raises(InputError) as error:
        replaced(tiny.config(None, Path("run")), field, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mesh", "use"), [(1, 1088), (3, 1152), (5, 1280)])
def test_batch_size_when_it_does_not_divide_then_the_one_advised_suits_virtual_shards_and_devices(mesh, use):
    config = tiny.config(None, Path("run"))
    config = dataclasses.replace(config, mesh=MeshConfig(chips=mesh))
    with pytest.raises(InputError, match=f"virtual_shards 64 does not divide: use {use}, or"):
        dataclasses.replace(config, data=DataConfig(batch_size=1026))
    data = DataConfig(batch_size=use, eval_batch_size=data_of_devices(mesh).eval_batch_size)
    check_parts(dataclasses.replace(config, data=data).data, mesh, 1, batches=["batch_size", "eval_batch_size"])


def data_of_devices(devices: int) -> DataConfig:
    """Batches of the default sizes, as the errors for so many devices advise."""
    data = DataConfig(batch_size=1024)
    for name in ("batch_size", "eval_batch_size"):
        if getattr(data, name) % devices:
            with pytest.raises(InputError) as error:
                check_parts(data, devices, 1, batches=[name])
            advised = re.findall(r"devices do not divide: use (\d+), or another number of devices", str(error.value))
            data = dataclasses.replace(data, **{name: int(advised[0])})
    return data


@pytest.mark.parametrize("size", [10**10, 2**62, 2**70])
@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
def test_batch_size_when_a_batch_exceeds_the_memory_then_one_line_says_so(tmp_path, name, size):
    config = tiny.config(None, tmp_path / "run")
    config = replaced(dataclasses.replace(config, stated=tiny.card()), f"data.{name}", size)
    with pytest.raises(InputError, match=rf"^(the tables do not fit .* halve the batch|data.{name} is {size}, so)"):
        tiny.train_quietly(config)


def test_virtual_shards_when_processes_do_not_divide_them_then_what_is_advised_suits_all_three():
    data = DataConfig(path="data", batch_size=1152, eval_batch_size=4224)
    with pytest.raises(InputError, match=r"3 processes do not divide: .* for a new run 66 virtual shards"):
        check_parts(data, 3, 3, batches=["batch_size"])
    wider = dataclasses.replace(data, virtual_shards=66)
    sizes = {name: wider.next_batch_size(getattr(data, name), 3) for name in ("batch_size", "eval_batch_size")}
    assert sizes == {"batch_size": 1188, "eval_batch_size": 4224}
    check_parts(dataclasses.replace(wider, **sizes), 3, 3, batches=["batch_size", "eval_batch_size"])


def test_specs_when_features_share_a_table_then_it_has_the_rows_of_the_largest_and_its_own_settings():
    config = EmbeddingConfig(
        default=TableConfig(dim=4),
        tables={"things": TableConfig(dim=8, optimizer="adam", frozen=True)},
        shared={"things": ("item", "tags")},
        default_pooling="mean",
        pooling={"tags": "none"},
    )
    tables, features = make_specs(config, CARD)
    assert [(table.name, table.num_rows, table.dim, table.optimizer, table.frozen) for table in tables] == [
        ("user", tiny.USERS, 4, "rowwise_adagrad", False),
        ("things", tiny.ITEMS, 8, "adam", True),
    ]
    assert [(feature.name, feature.table, feature.pooling, feature.max_ids) for feature in features] == [
        ("user", "user", "mean", 1),
        ("item", "things", "mean", 1),
        ("tags", "things", "none", tiny.MAX_TAGS),
    ]


def test_specs_when_the_config_names_features_then_only_those_are_used_in_its_order():
    tables, features = make_specs(EmbeddingConfig(features=("tags", "user")), CARD)
    assert [feature.name for feature in features] == ["tags", "user"]
    assert [table.name for table in tables] == ["tags", "user"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EmbeddingConfig(features=("usr",)), "no sparse feature 'usr'; it has ['user', 'item', 'tags']"),
        (EmbeddingConfig(pooling={"usr": "mean"}), "embedding.pooling names 'usr', which is not a feature in use"),
        (
            EmbeddingConfig(features=("user",), pooling={"item": "mean"}),
            "embedding.pooling names 'item', which is not a feature in use; those are ['user']",
        ),
        (
            EmbeddingConfig(shared={"t": ("user", "itm")}),
            "embedding.shared.t names 'itm', which is not a feature in use; those are ['item', 'tags', 'user']; "
            "another table takes another --embedding.shared",
        ),
        (
            EmbeddingConfig(shared={"a": ("user",), "b": ("user",)}),
            "feature 'user' is in the shared tables 'a' and 'b'; keep one",
        ),
        (EmbeddingConfig(tables={"usr": TableConfig()}), "embedding.tables names 'usr', which no feature uses"),
    ],
)
def test_specs_when_the_config_names_what_the_card_has_not_then_one_line_names_it(config, message):
    with pytest.raises(InputError) as error:
        make_specs(config, CARD)
    assert message in str(error.value)


def test_training_when_the_features_are_all_dense_then_one_line_says_that_a_model_embeds_at_least_one(tmp_path):
    config = dataclasses.replace(tiny.config(None, tmp_path / "run"), stated=tiny.card(sparse=()))
    with pytest.raises(InputError, match="dataset 'tiny' has no sparse features; a DLRM embeds at least one"):
        tiny.train_quietly(config)


def test_model_when_a_feature_is_unpooled_then_the_error_names_it():
    config = tiny.config(None, Path("run"))
    embedding = dataclasses.replace(config.embedding, pooling={"tags": "none"})
    with pytest.raises(InputError, match=r"feature 'tags' is unpooled, .* set embedding.pooling.tags to sum or mean"):
        Recommender(dataclasses.replace(config, embedding=embedding), CARD)


def test_model_when_its_kernels_are_for_other_devices_then_one_line_says_which_are_for_these():
    config = tiny.config(None, Path("run"))
    with pytest.raises(InputError, match="kernels: implementation 'mosaic_tpu' is none for cpu; use cpu, xla, or None"):
        Recommender(dataclasses.replace(config, kernels="mosaic_tpu"), CARD)
    Recommender(dataclasses.replace(config, kernels="xla"), CARD)


def test_kernels_when_they_cannot_serve_a_table_then_one_line_says_why():
    default = TableConfig(dim=8, dtype="bfloat16", rounding="split")
    config = replaced(tiny.config(None, Path("run")), "embedding", EmbeddingConfig(default=default))
    layout = Recommender(config, CARD).tables.layout
    mesh = make_mesh()
    with interpreting("NVIDIA A100-SXM4-40GB"), pytest.raises(InputError, match="kernels need an H100 or later"):
        check_kernels("mosaic_gpu", mesh)
    with interpreting("NVIDIA H200"):
        check_kernels("mosaic_gpu", mesh, layout)
    with interpreting("TPU v5"):
        check_kernels("mosaic_tpu", mesh)
        with pytest.raises(InputError, match="'mosaic_tpu' cannot serve this call: split weights are not served"):
            check_kernels("mosaic_tpu", mesh, layout)
        check_kernels("sparsecore", mesh, layout)
        large = dataclasses.replace(layout.stores[0], lines_per_device=2**25 + 2)
        with pytest.raises(InputError, match="a store of 17179870208 bytes is too large"):
            check_kernels("sparsecore", mesh, dataclasses.replace(layout, stores=(large,)))


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, []),
        (
            {"train": TrainConfig(eval_every=9, early_stop=2, best_by="auc", eval_split=None)},
            [
                "train.eval_every 9 has no effect: train.eval_split is None, so nothing is evaluated",
                "train.early_stop 2 has no effect: train.eval_split is None",
                "train.best_by auc has no effect: train.eval_split is None",
            ],
        ),
        ({"train": TrainConfig(eval_every=9, early_stop=2, best_by="auc")}, []),
        # scripts/eval.py reads eval_batch_size all the same.
        ({"train": TrainConfig(eval_split=None), "data": DataConfig(eval_batch_size=64)}, []),
        (
            {"data": DataConfig(shuffle_window=64, prefetch=3, threads=1), "stated": CARD},
            [
                "data.shuffle_window 64 has no effect: data.path is None, so batches are random",
                "data.prefetch 3 has no effect: data.path is None",
                "data.threads 1 has no effect: data.path is None",
            ],
        ),
        ({"data": DataConfig(shuffle_window=64, prefetch=3, threads=1)}, []),  # whose dataset is still to be named
        ({"data": DataConfig(path="data", threads=1), "stated": CARD}, []),
        (
            {"exchange": ExchangeConfig(forward="int8", backward="float16", all_reduce="bfloat16")},
            [
                "exchange.forward int8 has no effect: one device sends nothing",
                "exchange.backward float16 has no effect: one device",
                "exchange.all_reduce bfloat16 has no effect: one device",
            ],
        ),
        (
            {"train": TrainConfig(order_by="compiler")},
            ["train.order_by compiler has no effect: one device sends nothing"],
        ),
        (
            {
                "exchange": ExchangeConfig(forward="int8"),
                "train": TrainConfig(order_by="compiler"),
                "mesh": MeshConfig(chips=2),
            },
            [],
        ),
        (
            {"dense_optimizer": DenseOptimizerConfig(name="adagrad", momentum=0.9, beta1=0.5)},
            ["dense_optimizer.momentum 0.9 has no effect", "dense_optimizer.beta1 0.5 has no effect"],
        ),
        ({"dense_optimizer": DenseOptimizerConfig(name="sgd", momentum=0.9)}, []),
        ({"model": ModelConfig(bottom_mlp=(8,), top_mlp=(1,), cross_rank=8)}, ["model.cross_rank 8 has no effect"]),
        (
            {"embedding": EmbeddingConfig(tables={"item": TableConfig(beta2=0.5, rounding="stochastic")})},
            ["embedding.tables.item.beta2 0.5 has no effect", "embedding.tables.item.rounding stochastic has no eff"],
        ),
        (
            {
                "embedding": EmbeddingConfig(
                    default=TableConfig(frozen=True, optimizer="adam", beta1=0.5, dtype="bfloat16", rounding="split"),
                    tables={"item": TableConfig(initial_values="i.npy", initializer=Initializer(scale=0.1))},
                )
            },
            [
                "embedding.default.optimizer adam has no effect: the table is frozen",
                "embedding.default.beta1 0.5 has no effect",
                "embedding.default.rounding split has no effect",
                "embedding.tables.item.initializer Initializer(kind='uniform', scale=0.1) has no effect: rows begin",
            ],
        ),
    ],
)
def test_settings_when_others_leave_them_without_effect_then_a_line_each_says_so(settings, lines):
    config = Config(name="any", **{"model": ModelConfig(bottom_mlp=(8,), top_mlp=(1,)), **settings})
    noted = list(without_effect(config))
    assert len(noted) == len(lines)
    assert all(note.startswith(line) for note, line in zip(noted, lines, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_when_built_then_no_setting_is_without_effect(name):
    assert list(without_effect(CONFIGS[name]())) == []
