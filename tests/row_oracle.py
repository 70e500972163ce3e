"""Update rules for one row in float64, written from their formulas, independently of pallas_kernels.row_optimizers."""

import numpy as np

ELEMENT_STATES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 0, "adam": 2, "partial_rowwise_adam": 1, "lamb": 2}
ROW_STATES = {"sgd": 0, "adagrad": 0, "rowwise_adagrad": 1, "adam": 0, "partial_rowwise_adam": 1, "lamb": 0}
RULES = tuple(ELEMENT_STATES)


def updated_row(
    rule: str,
    weights: np.ndarray,
    state: list[np.ndarray],
    gradient: np.ndarray,
    *,
    dim: float,
    step: int,
    learning_rate: float,
    weight_decay: float,
    eps: float,
    beta1: float,
    beta2: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One row and its states, elementwise ones first, after one update; ``dim`` divides means over the row."""
    w, g = weights.astype(np.float64), gradient.astype(np.float64)
    if rule in ("sgd", "adagrad", "rowwise_adagrad"):
        g = g + weight_decay * w
    if rule == "sgd":
        return w - learning_rate * g, []
    if rule in ("adagrad", "rowwise_adagrad"):
        squares = g**2 if rule == "adagrad" else np.sum(g**2) / dim
        moment = state[0] + squares
        return w - learning_rate * g / (np.sqrt(moment) + eps), [moment]
    squares = np.sum(g**2) / dim if rule == "partial_rowwise_adam" else g**2
    first = beta1 * state[0] + (1 - beta1) * g
    second = beta2 * state[1] + (1 - beta2) * squares
    direction = (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + eps)
    update = direction + weight_decay * w
    trust = 1.0
    if rule == "lamb" and np.linalg.norm(w) > 0 and np.linalg.norm(update) > 0:
        trust = np.linalg.norm(w) / np.linalg.norm(update)
    return w - learning_rate * trust * update, [first, second]


def gradients_of_rows(
    rows: np.ndarray, bags: np.ndarray, gradients: np.ndarray, weights: np.ndarray | None = None
) -> dict[int, np.ndarray]:
    """Sum of the gradients of all occurrences of each row, in float64; ids without a bag left out."""
    sums: dict[int, np.ndarray] = {}
    for i, (row, bag) in enumerate(zip(rows.tolist(), bags.tolist(), strict=False)):
        scale = 1.0 if weights is None else float(weights[i])
        sums[row] = sums.get(row, 0.0) + scale * gradients[bag].astype(np.float64)
    return sums
