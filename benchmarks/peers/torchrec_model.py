"""TorchRec: its own DLRM, with FBGEMM's fused tables, whose update happens in the backward pass.

In `.venv-peers`: python -m benchmarks.peers.torchrec_model CASE STARTED [compiled]
"""

# pyright: reportMissingImports=false
# (torch and TorchRec live in .venv-peers only)

import sys
from typing import Any

import torch
from torch import nn
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.peers.case import Case, CaseBatch, dense_weights, rows_of_upper_triangle, table_blocks
from benchmarks.peers.serve import MATMUL_SIZE, StepByStep, serve
from benchmarks.peers.torch_model import set_mlp


class TorchRec(StepByStep):
    """Trains a case; see `serve.Side`."""

    def __init__(self, case: Case, *, compiled: bool):
        super().__init__(case)
        self._case = case
        self._tables = FusedEmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    feature_names=[name],
                    num_embeddings=rows,
                    embedding_dim=case.dim,
                    pooling=PoolingType.SUM,
                )
                for name, rows in zip(case.features, case.num_rows, strict=True)
            ],
            optimizer_type={"sgd": torch.optim.SGD, "rowwise_adagrad": RowWiseAdagrad}[case.optimizer],
            optimizer_kwargs={"lr": case.table_learning_rate} | ({} if case.optimizer == "sgd" else {"eps": case.eps}),
            device=torch.device("cpu"),
        )
        dense: dict[str, Any] = {
            "dense_in_features": case.num_dense,
            "dense_arch_layer_sizes": list(case.bottom_mlp),
            "over_arch_layer_sizes": list(case.top_mlp),
        }
        if case.cross_layers:
            cross = {"dcn_num_layers": case.cross_layers, "dcn_low_rank_dim": case.cross_rank}
            self._model: nn.Module = DLRM_DCN(self._tables, **dense, **cross)
        else:
            self._model = DLRM(self._tables, **dense)
        self._dense_params = [
            parameter for name, parameter in self._model.named_parameters() if not name.startswith("sparse_arch")
        ]
        self._optimizer = torch.optim.SGD(self._dense_params, lr=case.learning_rate, fused=True)
        self._loss = nn.BCEWithLogitsLoss()
        if compiled:
            for part in ("dense_arch", "inter_arch", "over_arch"):
                getattr(self._model, part).compile()
        self._autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16")
        self._square = torch.rand(MATMUL_SIZE, MATMUL_SIZE).to(getattr(torch, case.dtype))

    def load(self) -> None:
        """See `serve.Side`."""
        case, weights = self._case, dense_weights(self._case)
        with torch.no_grad():
            for number, name in enumerate(case.features):
                table = self._tables.embedding_bags[name].weight
                for first, rows in table_blocks(case, number):
                    table[first : first + len(rows)] = torch.from_numpy(rows)
            for layer, (v, u, bias) in enumerate(weights.cross):
                cross = self._model.inter_arch.crossnet
                cross.V_kernels[layer].copy_(torch.from_numpy(v).T)
                cross.W_kernels[layer].copy_(torch.from_numpy(u).T)
                cross.bias[layer].copy_(torch.from_numpy(bias))
        if not case.cross_layers:
            kernel, bias = weights.top[0]
            weights.top[0] = (kernel[rows_of_upper_triangle(case)], bias)
        set_mlp(self._model.dense_arch, weights.bottom)
        set_mlp(self._model.over_arch, weights.top)

    def _train(self, batch: CaseBatch) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        ids = KeyedJaggedTensor(
            keys=list(self._case.features),
            values=torch.from_numpy(batch.ids),
            lengths=torch.from_numpy(batch.lengths).reshape(-1),
            stride=self._case.batch_size,
        )
        with self._autocast:
            logits = self._model(torch.from_numpy(batch.dense), ids)[:, 0]
        loss = self._loss(logits.float(), torch.from_numpy(batch.label))
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def matmul(self) -> None:
        """See `serve.Side`."""
        torch.matmul(self._square, self._square)


if __name__ == "__main__":
    serve(lambda case: TorchRec(case, compiled="compiled" in sys.argv[3:]))
