"""ShardedTables against FBGEMM's fused lookup and exact optimizers, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from sharding import Embeddings, FeatureSpec, KeyedJagged, ShardedTables, TableSpec

# FBGEMM adds the gradients of a row in another order, and its mean multiplies by the reciprocal.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_tables_trained_for_five_steps_then_equal_fbgemms(shared, optimizer, pooling):
    golden = np.load(shared / "golden" / f"update_exact_{optimizer}_{pooling}.npz")
    num_tables, batch_size = golden["step0_lengths"].shape
    starts = [golden[f"init_table_{t}"] for t in range(num_tables)]
    specs = [
        TableSpec(
            name=f"t{t}",
            num_rows=starts[t].shape[0],
            dim=starts[t].shape[1],
            optimizer=optimizer,
            learning_rate=float(golden["lr"]),
            eps=float(golden.get("eps", 1e-8)),
        )
        for t in range(num_tables)
    ]
    features = tuple(f"f{t}" for t in range(num_tables))
    tables = ShardedTables(
        specs, [FeatureSpec(name=f, table=s.name, pooling=pooling) for f, s in zip(features, specs, strict=True)]
    )
    state = tables.init()
    for spec, start in zip(specs, starts, strict=True):
        state = tables.write_rows(state, spec.name, 0, start)
    assert tables.blocks[0].names == features
    for step in range(5):
        values = golden[f"step{step}_values"].astype(np.int32)
        ids = KeyedJagged(
            values=np.pad(values, (0, 160 - len(values))),
            lengths=golden[f"step{step}_lengths"].astype(np.int32),
            features=features,
        )
        routed = tables.route(ids)
        pooled = tables.lookup(state, routed)
        np.testing.assert_allclose(
            pooled.blocks[0].reshape(batch_size, -1), golden[f"step{step}_pooled"].reshape(batch_size, -1), **TOLERANCE
        )
        gradients = golden[f"step{step}_pooled_grad"].reshape(batch_size, num_tables, -1)
        gradients = Embeddings(blocks=(jnp.asarray(gradients),), sequences={}, names=pooled.names)
        state = tables.update(state, routed, gradients, step=step + 1)
        for t, spec in enumerate(specs):
            rows = tables.read_rows(state, spec.name, np.arange(spec.num_rows))
            np.testing.assert_allclose(rows, golden[f"step{step}_table_{t}"], **TOLERANCE)
            kept = tables.read_optimizer_state(state, spec.name, np.arange(spec.num_rows))
            for k, values in enumerate(kept.values()):
                np.testing.assert_allclose(values, golden[f"step{step}_state_{t}_{k}"], **TOLERANCE)
