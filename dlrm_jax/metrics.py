"""Metrics of click prediction: normalised entropy, AUC, log loss, accuracy, calibration.

Two accumulators: `BinnedMetrics` on the device, inside the training step, with an AUC from a histogram of logits;
`ExactMetrics` on the host, for evaluation, which keeps every sample. Both take logits, labels in [0, 1] and weights.

A label y between 0 and 1 counts as two samples with the same logit: one positive of weight y w, one negative of weight
(1 - y) w. Samples of weight 0 do not count at all, whatever their logit.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of a set of samples. A metric that is undefined is nan.

    Attributes:
        num_samples: Number of samples with a weight above 0.
        auc: Area under the ROC curve: the probability that a positive has a higher logit than a negative, where
            equal logits count one half. Undefined if one of the classes is missing.
        auc_error_bound: The exact AUC differs from `auc` by no more than this.
        ne: Normalised entropy: log loss divided by that of always predicting the base rate p, which is
            -p log p - (1 - p) log(1 - p). Undefined if one of the classes is missing. Source: He et al. 2014,
            "Practical Lessons from Predicting Clicks on Ads at Facebook", equation 1.
        log_loss: Weighted mean of the binary cross-entropy, in nats.
        accuracy: Weighted share of samples whose label is predicted by `logit > 0`, that is, a probability above 1/2.
        calibration: Sum of predicted probabilities divided by sum of labels, both weighted. Undefined without
            positives.
    """

    num_samples: int
    auc: float
    auc_error_bound: float
    ne: float
    log_loss: float
    accuracy: float
    calibration: float


# Up to so many a float32 counts.
EXACT_SAMPLES = 2**24
# What the accumulators sum, in this order: weight w, positive weight w y, loss, correct weight, predicted probability.
_NUM_SUMS = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BinnedMetrics:
    """Metrics of the samples of one log window, accumulated on the device.

    AUC comes from a histogram of the logits, in equal bins of [-16, 16]; logits outside fall into the first and the
    last bin. With p_b and n_b the weights of positives and negatives in bin b, and P and N their sums, positives and
    negatives of different bins are ordered as their bins are, and those of one bin count one half::

        AUC_binned = sum_b p_b (sum_{a<b} n_a + n_b / 2) / (P N)

    The pairs within bin b add something between 0 and p_b n_b to the exact AUC's sum, and p_b n_b / 2 here, so::

        |AUC - AUC_binned| <= sum_b p_b n_b / (2 P N)

    which `compute` reports. It is about 1.4e-4 for 32768 bins and logits with a standard deviation of 1.

    float32 sums lose increments. The sums are therefore compensated (Neumaier 1974), and the histogram is exact for
    weights of 1 while no bin holds more than `EXACT_SAMPLES` (other weights round it, by about 1e-7 of a bin at each
    addition). Before that, start again from `zeros`, and `merge` the states on the host, which is float64.

    Every device adds to a part of its own, lest they exchange anything at each step; `compute` adds the parts up.

    Attributes:
        sums: Sums of w, w y, w loss, w correct, w p.
        compensation: What to add to `sums`: the roundings lost.
        num_samples: Number of samples with a weight above 0.
        histogram: Weight of the positives and of the negatives in each bin.
    """

    sums: Float[Any, "parts 5"]
    compensation: Float[Any, "parts 5"]
    num_samples: Int[Any, " parts"]
    histogram: Float[Any, "parts bins 2"]

    @classmethod
    def zeros(cls, num_bins: int = 32768, *, parts: int = 1) -> "BinnedMetrics":
        """Returns the state of no samples.

        Args:
            num_bins: Number of bins of the logit. The error bound of AUC falls as its inverse.
            parts: Devices that add to it.
        """
        return cls(
            sums=jnp.zeros((parts, _NUM_SUMS), jnp.float32),
            compensation=jnp.zeros((parts, _NUM_SUMS), jnp.float32),
            num_samples=jnp.zeros(parts, jnp.int32),
            histogram=jnp.zeros((parts, num_bins, 2), jnp.float32),
        )

    def update(
        self, logits: Float[Array, " B"], label: Float[Array, " B"], weight: Float[Array, " B"]
    ) -> "BinnedMetrics":
        """Adds a batch; usable under jit. Of several parts, each device adds to its own inside `jax.shard_map`.

        Args:
            logits: Logits of B samples.
            label: Labels in [0, 1].
            weight: Sample weights, at least 0.

        Returns:
            The new state.
        """
        counts = weight > 0
        logits = jnp.where(counts, logits, jnp.zeros_like(logits))
        loss = optax.sigmoid_binary_cross_entropy(logits, label)
        correct = jnp.where(logits > 0, label, 1 - label)
        terms = jnp.stack([jnp.ones_like(label), label, loss, correct, jax.nn.sigmoid(logits)])
        increment = jnp.sum(terms * weight[None, :], axis=1)[None]
        total = self.sums + increment
        larger_first = jnp.abs(self.sums) >= jnp.abs(increment)
        lost = jnp.where(larger_first, (self.sums - total) + increment, (increment - total) + self.sums)

        masses = jnp.stack([label * weight, (1 - label) * weight], axis=1)
        histogram = self.histogram.at[0, _bin_of(logits, self.histogram.shape[1])].add(masses)
        return BinnedMetrics(
            sums=total,
            compensation=self.compensation + lost,
            num_samples=self.num_samples + jnp.sum(counts, dtype=jnp.int32),
            histogram=histogram,
        )

    def merge(self, other: "BinnedMetrics") -> "BinnedMetrics":
        """Adds two states on the host, in float64.

        Args:
            other: A state with the same bins.

        Returns:
            A state of numpy arrays, 64 bits wide.
        """

        def add(left, right):
            left, right = np.asarray(left), np.asarray(right)
            wide = np.int64 if np.issubdtype(left.dtype, np.integer) else np.float64
            return np.asarray(left.astype(wide) + right.astype(wide))

        return jax.tree.map(add, self, other)

    def compute(self) -> Metrics:
        """Computes the metrics on the host; it waits for the device."""
        state = jax.device_get(self)
        sums = np.sum(state.sums, axis=0, dtype=np.float64) + np.sum(state.compensation, axis=0, dtype=np.float64)
        histogram = np.sum(state.histogram, axis=0, dtype=np.float64)
        auc, bound = _auc(histogram[:, 0], histogram[:, 1])
        return _metrics(num_samples=int(np.sum(state.num_samples)), auc=auc, auc_error_bound=bound, sums=sums)


class ExactMetrics:
    """Metrics of an evaluation, from all its samples, on the host in float64.

    It keeps 12 bytes a sample, and needs about 60 more a sample while it computes.
    """

    def __init__(self):
        self._chunks: list[Float[np.ndarray, "3 chunk"]] = []

    def update(self, logits: Float[Any, " B"], label: Float[Any, " B"], weight: Float[Any, " B"]) -> None:
        """Adds a batch.

        Args:
            logits: Logits of B samples.
            label: Labels in [0, 1].
            weight: Sample weights, at least 0; samples of weight 0 are dropped.
        """
        chunk = np.stack([np.asarray(part, np.float32) for part in (logits, label, weight)])
        self._chunks.append(chunk[:, chunk[2] > 0])

    def compute(self) -> Metrics:
        """Computes the metrics of all samples so far."""
        samples = np.concatenate(self._chunks, axis=1) if self._chunks else np.zeros((3, 0), np.float32)
        samples = samples[:, np.argsort(samples[0], kind="stable")]
        logits, label, weight = samples.astype(np.float64)
        positive, negative = label * weight, (1 - label) * weight
        with np.errstate(invalid="ignore"):  # the metrics say that a logit is not finite
            loss = np.logaddexp(0.0, logits) - label * logits
            probability = np.exp(-np.logaddexp(0.0, -logits))
        correct = np.where(logits > 0, positive, negative)
        sums = [weight.sum(), positive.sum(), (loss * weight).sum(), correct.sum(), (probability * weight).sum()]
        # Samples of equal logits are one bin, in which the half that AUC counts is exact.
        starts = np.flatnonzero(np.append(True, logits[1:] != logits[:-1])[: len(logits)])
        auc = _auc(np.add.reduceat(positive, starts), np.add.reduceat(negative, starts))[0] if len(starts) else math.nan
        return _metrics(num_samples=len(logits), auc=auc, auc_error_bound=0.0, sums=np.array(sums))


_LOWEST_LOGIT, _HIGHEST_LOGIT = -16.0, 16.0


def _bin_of(logits: Float[Array, " B"], num_bins: int) -> Int[Array, " B"]:
    """The bin of each logit, non-decreasing in the logit. NaN goes to bin 0, and `sums` says that it was there."""
    position = (logits - _LOWEST_LOGIT) * (num_bins / (_HIGHEST_LOGIT - _LOWEST_LOGIT))
    position = jnp.where(jnp.isnan(position), jnp.zeros_like(position), jnp.clip(position, 0, num_bins - 1))
    return position.astype(jnp.int32)


def _auc(positive: Float[np.ndarray, " bins"], negative: Float[np.ndarray, " bins"]) -> tuple[float, float]:
    """AUC of a histogram of which each bin counts one half, and the bound of its error; bins in ascending order."""
    pairs = positive.sum() * negative.sum()
    if not pairs > 0:
        return math.nan, math.nan
    below = np.cumsum(negative) - negative
    # Not "@": a thread of BLAS goes on waiting for more work then, on a core that the next steps need.
    area, ties = np.sum(positive * (below + 0.5 * negative)), np.sum(positive * negative)
    return float(area / pairs), float(0.5 * ties / pairs)


def _metrics(*, num_samples: int, auc: float, auc_error_bound: float, sums: Float[np.ndarray, "5"]) -> Metrics:
    weight, positive, loss, correct, predicted = (float(value) for value in sums)
    log_loss = loss / weight if weight > 0 else math.nan
    base_rate = positive / weight if weight > 0 else math.nan
    both_classes = 0 < base_rate < 1
    entropy = -base_rate * math.log(base_rate) - (1 - base_rate) * math.log1p(-base_rate) if both_classes else math.nan
    if not (both_classes and math.isfinite(log_loss)):
        auc = auc_error_bound = math.nan
    return Metrics(
        num_samples=num_samples,
        auc=auc,
        auc_error_bound=auc_error_bound,
        ne=log_loss / entropy,
        log_loss=log_loss,
        accuracy=correct / weight if weight > 0 else math.nan,
        calibration=predicted / positive if positive > 0 else math.nan,
    )
