"""Plain PyTorch: an nn.EmbeddingBag with sparse gradients for each table, as in facebookresearch/dlrm.

In `.venv-peers`: python -m benchmarks.peers.torch_model CASE STARTED [compiled]
"""

# pyright: reportMissingImports=false
# (torch lives in .venv-peers only)

import itertools
import sys

import torch
from torch import nn

from benchmarks.peers.case import Case, CaseBatch, dense_weights, table_blocks
from benchmarks.peers.serve import MATMUL_SIZE, StepByStep, serve


class DensePart(nn.Module):
    """Bottom MLP, interaction and top MLP."""

    def __init__(self, case: Case):
        super().__init__()
        self.bottom = _mlp(case.num_dense, case.bottom_mlp, last_relu=True)
        self.top = _mlp(case.interaction_width, case.top_mlp, last_relu=False)
        width, rank = case.interaction_width, case.cross_rank
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(case.cross_layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(case.cross_layers))
        rows, columns = torch.tril_indices(case.num_vectors, case.num_vectors, offset=-1)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, dense: torch.Tensor, embeddings: list[torch.Tensor]) -> torch.Tensor:
        """Logits [B] of dense features [B, num_dense] and, for each feature, embeddings [B, D]."""
        x = self.bottom(dense)
        joined = torch.cat([x, *embeddings], dim=1)
        if len(self.down):
            z = joined
            for down, up in zip(self.down, self.up, strict=True):
                z = joined * up(down(z)) + z
        else:
            vectors = joined.view(len(x), -1, x.shape[1])
            products = torch.bmm(vectors, vectors.transpose(1, 2))
            z = torch.cat([x, products[:, self.rows, self.columns]], dim=1)
        return self.top(z)[:, 0]


def _mlp(inputs: int, widths: tuple[int, ...], *, last_relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise((inputs, *widths)):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers) if last_relu else nn.Sequential(*layers[:-1])


def set_linear(layer: nn.Linear, kernel, bias) -> None:
    """Overwrites a layer with a kernel [inputs, outputs] and, unless None, a bias."""
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel).T)
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))


def set_mlp(mlp: nn.Module, layers: list[tuple]) -> None:
    """Overwrites all linear layers of a module, in its order, with kernels and biases."""
    linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    for linear, (kernel, bias) in zip(linears, layers, strict=True):
        set_linear(linear, kernel, bias)


class PlainTorch(StepByStep):
    """Trains a case; see `serve.Side`."""

    def __init__(self, case: Case, *, compiled: bool):
        super().__init__(case)
        self._case = case
        self._tables = nn.ModuleList(
            nn.EmbeddingBag(rows, case.dim, mode="sum", sparse=True, include_last_offset=True) for rows in case.num_rows
        )
        self._dense = DensePart(case)
        # The tables stay outside: torch.compile knows no sparse gradients.
        self._logits = torch.compile(self._dense) if compiled else self._dense
        self._loss = nn.BCEWithLogitsLoss()
        self._optimizers = [
            torch.optim.SGD(self._tables.parameters(), lr=case.table_learning_rate),
            torch.optim.SGD(self._dense.parameters(), lr=case.learning_rate, fused=True),
        ]
        self._autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16")
        self._square = torch.rand(MATMUL_SIZE, MATMUL_SIZE).to(getattr(torch, case.dtype))

    def load(self) -> None:
        """See `serve.Side`."""
        weights = dense_weights(self._case)
        with torch.no_grad():
            for number, table in enumerate(self._tables):
                for first, rows in table_blocks(self._case, number):
                    table.weight[first : first + len(rows)] = torch.from_numpy(rows)
        set_mlp(self._dense.bottom, weights.bottom)
        set_mlp(self._dense.top, weights.top)
        for down, up, (v, u, bias) in zip(self._dense.down, self._dense.up, weights.cross, strict=True):
            set_linear(down, v, None)
            set_linear(up, u, bias)

    def _train(self, batch: CaseBatch) -> torch.Tensor:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        ids, first, embeddings = torch.from_numpy(batch.ids), 0, []
        for table, lengths in zip(self._tables, batch.lengths, strict=True):
            offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            torch.cumsum(torch.from_numpy(lengths), 0, out=offsets[1:])
            count = int(offsets[-1])
            embeddings.append(table(ids[first : first + count], offsets))
            first += count
        with self._autocast:
            logits = self._logits(torch.from_numpy(batch.dense), embeddings)
        loss = self._loss(logits.float(), torch.from_numpy(batch.label))
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.detach()

    def matmul(self) -> None:
        """See `serve.Side`."""
        torch.matmul(self._square, self._square)


if __name__ == "__main__":
    serve(lambda case: PlainTorch(case, compiled="compiled" in sys.argv[3:]))
