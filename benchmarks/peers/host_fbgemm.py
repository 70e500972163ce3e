"""FBGEMM's side of host_kernels.py, in `.venv-peers`: reads numbers of steps, answers with times in milliseconds."""

# pyright: reportMissingImports=false
# (torch and FBGEMM live in .venv-peers only)

import json
import sys
import time

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from host_case import BATCH_SIZE, EPS, LEARNING_RATE, NUM_ROWS, NUM_TABLES, Case, batch_of


def main(width: int, pooling_factor: int, ids_kind: str) -> None:
    """Serves one case until stdin ends.

    Args:
        width: Of the tables.
        pooling_factor: Ids of a bag.
        ids_kind: "uniform" or "zipf".
    """
    case = Case(width=width, pooling_factor=pooling_factor, ids=ids_kind)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(NUM_ROWS, width, EmbeddingLocation.HOST, ComputeDevice.CPU)] * NUM_TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=EPS,
    )
    for table in tables.split_embedding_weights():
        table.fill_(0.1)
    ids, gradients = batch_of(case)
    ids = torch.from_numpy(ids)
    offsets = torch.arange(0, case.num_ids + 1, pooling_factor)
    # FBGEMM's results are [samples, tables * width].
    gradients = torch.from_numpy(gradients).permute(1, 0, 2).reshape(BATCH_SIZE, -1).contiguous()
    for line in sys.stdin:
        times: dict[str, list[float]] = {"lookup": [], "lookup_update": []}
        for _ in range(int(line)):
            with torch.no_grad():
                started = time.perf_counter()
                tables(ids, offsets)
                times["lookup"].append(1e3 * (time.perf_counter() - started))
            started = time.perf_counter()
            tables(ids, offsets).backward(gradients)
            times["lookup_update"].append(1e3 * (time.perf_counter() - started))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
