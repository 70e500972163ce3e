"""KeyedJagged: the ids of many features, each sample holding any number of them, in one pytree.

Letters: F features, b samples (of one device).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt32

from sharding.errors import InputError, check_type
from sharding.tables import MAX_IDS

# Ids of a table of at most so many rows are one word of 32 bits.
MAX_NARROW_ROWS = 2**31 - 1
_LOW, _HIGH = -(2**31), 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedJagged:
    """Ids of many features: one array of values and one of lengths for all of them (paper.md, mechanism 8).

    The bags lie feature by feature, and within a feature sample by sample: the ids of feature ``f`` in sample ``s``
    are the ``lengths[f, s]`` values that follow those of all bags before. Values beyond ``lengths.sum()`` are
    padding and mean nothing. Lengths, not offsets, because lengths of several batches concatenate.

    Where a table has more rows than 31 bits name, an id is two words of 32 bits, low word first: ``values`` is then
    uint32 of [capacity, 2]. `words_of_ids` makes them, and where no id needs the second word it may be left out.

    Attributes:
        values: Ids, feature-major, then padding up to the capacity.
        lengths: Number of ids in each bag.
        weights: One weight beside each id, or None if no feature has weights (an unweighted feature beside a
            weighted one has weight 1).
        features: Names of the features, in the order of ``lengths``' first axis.
        parts: Devices whose ids lie one device after the other, each with as much room: see `for_devices`.
    """

    values: Int[Any, "capacity ..."]
    lengths: Int[Any, "F b"]
    weights: Float[Any, " capacity"] | None = None
    features: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.lengths.shape[1]

    @property
    def capacity(self) -> int:
        """Number of ids that ``values`` has room for."""
        return self.values.shape[0]

    @classmethod
    def from_bags(
        cls,
        bags: Mapping[str, Sequence[Sequence[int]]],
        *,
        weights: Mapping[str, Sequence[Sequence[float]]] | None = None,
        capacity: int | None = None,
    ) -> "KeyedJagged":
        """Builds one from Python lists, for tests, notebooks and `predict`.

        Args:
            bags: For each feature, one list of ids for each sample.
            weights: For the weighted features, one weight for each id.
            capacity: Room for ids; as many as there are unless given.

        Returns:
            The same ids as numpy arrays.

        Raises:
            InputError: Features differ in the number of samples, a bag is no list, an id is no integer of 63 bits,
                weights do not match ids or are not finite, or the capacity is too small.
        """
        sizes = {name: len(samples) for name, samples in bags.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"features have different numbers of samples: {sizes}; give each feature one bag a sample")
        unknown = sorted(set(weights or {}) - set(bags))
        if unknown:
            raise InputError(f"weights are given for features without ids: {unknown}; give ids for them too")
        for name, given in (weights or {}).items():
            if len(given) != sizes[name]:
                raise InputError(
                    f"feature {name!r} has ids of {sizes[name]} samples, but weights of {len(given)}: give each sample "
                    "a list of weights, [] where it has no ids"
                )
        values: list[int] = []
        scales: list[float] = []
        for name, samples in bags.items():
            for sample, bag in enumerate(samples):
                where = f"feature {name!r}, sample {sample}"
                values.extend(_checked_ids(bag, where))
                scales.extend(_weights_of(weights, name, sample, len(bag), where))
        lengths = np.array([[len(bag) for bag in samples] for samples in bags.values()], np.int32)
        lengths = lengths.reshape(len(bags), next(iter(sizes.values()), 0))
        capacity = len(values) if capacity is None else capacity
        if capacity < len(values):
            raise InputError(f"{len(values)} ids do not fit into capacity {capacity}; raise it or leave it out")
        padding = capacity - len(values)
        wide = any(not _LOW <= value <= _HIGH for value in values)
        padded = np.array(values + [0] * padding, np.int64)
        return cls(
            values=words_of_ids(padded) if wide else padded.astype(np.int32),
            lengths=lengths,
            weights=None if weights is None else np.array(scales + [0.0] * padding, np.float32),
            features=tuple(bags),
        )


def _checked_ids(bag: Sequence[int], where: str) -> Sequence[int]:
    limits = np.iinfo(np.int64)
    if not hasattr(bag, "__len__"):
        raise InputError(f"{where}: {bag!r} is not a list of ids; give each sample one, [] where it has none")
    for value in bag:
        if not isinstance(value, int | np.integer):
            raise InputError(f"{where}: id {value!r} is not an integer; ids are row numbers")
        if not limits.min <= value <= limits.max:
            raise InputError(f"{where}: id {value} does not fit into 64 bits: tables hold at most 2**63 - 1 rows")
    return bag


def words_of_ids(ids: Int[np.ndarray, " n"]) -> UInt32[np.ndarray, "n 2"]:
    """Ids of 64 bits as two words of 32, low word first: JAX would narrow them silently."""
    return np.ascontiguousarray(ids, "<i8").view(np.uint32).reshape(-1, 2)


def ids_of_values(values: Int[np.ndarray, "n ..."]) -> Int[np.ndarray, " n"]:
    """Ids as `KeyedJagged` holds them, whatever their words, as 64 bits."""
    if values.ndim == 1:
        return values.astype(np.int64)
    return np.ascontiguousarray(values, np.uint32).view("<i8")[:, 0]


def _weights_of(
    weights: Mapping[str, Sequence[Sequence[float]]] | None, name: str, sample: int, num_ids: int, where: str
) -> Sequence[float]:
    given = (weights or {}).get(name)
    if given is None:
        return [1.0] * num_ids
    bag_weights = given[sample]
    if len(bag_weights) != num_ids:
        raise InputError(f"{where}: {num_ids} ids but {len(bag_weights)} weights; give one weight for each id")
    for weight in bag_weights:
        if not isinstance(weight, int | float | np.number) or not np.isfinite(weight):
            raise InputError(
                f"{where}: weight {weight!r} is not a finite number; leave its id out, or give it weight 0"
            )
    return bag_weights


def check_arrays(ids: KeyedJagged) -> None:
    """Raises InputError unless it is a batch whose arrays have the shapes and dtypes that they are declared with.

    Args:
        ids: Ids whose arrays may be numpy's, or tracers.
    """
    check_type(ids, KeyedJagged, "the batch of ids")
    two_words = ids.values.dtype == np.uint32 and ids.values.ndim == 2 and ids.values.shape[1] == 2
    if not (two_words or ids.values.dtype == np.int32) or ids.lengths.dtype != np.int32:
        raise InputError(
            f"ids and lengths are {ids.values.dtype} and {ids.lengths.dtype}, which JAX would narrow silently: check "
            "their range and give int32 (or ids as two words of uint32, see words_of_ids)"
        )
    if not (two_words or ids.values.ndim == 1) or ids.lengths.ndim != 2 or len(ids.lengths) != len(ids.features):
        raise InputError(
            f"ids of {len(ids.features)} features have values {ids.values.shape} and lengths {ids.lengths.shape}: give "
            "[capacity] and [features, samples]"
        )
    if len(set(ids.features)) < len(ids.features):
        raise InputError(f"a feature is named twice in {ids.features}; join its bags")
    if ids.weights is not None and ids.weights.shape != ids.values.shape[:1]:
        raise InputError(f"{ids.values.shape} ids have {ids.weights.shape} weights; give one weight for each id")
    if ids.weights is not None and ids.weights.dtype != np.float32:
        raise InputError(f"weights are {ids.weights.dtype}; give float32")


def for_devices(ids: KeyedJagged, num_devices: int, capacity: int | None) -> KeyedJagged:
    """Gives each of several devices its own part of a batch, on the host.

    Args:
        ids: The batch, as numpy arrays, feature by feature.
        num_devices: Devices; the number of samples is a multiple of it.
        capacity: Room for the ids of one device; as many as the batch has room for if None.

    Returns:
        The same lengths, and ``num_devices`` times ``capacity`` values: those of device d's samples, feature by
        feature, from ``d * capacity`` on. Ids that have no room there are left out, and since the lengths still tell
        of them, the route reports what they need.

    Raises:
        InputError: The samples do not divide, the lengths are those of other ids, devices have their parts already, one
            has more ids than 32 bits number, or the capacity is no whole number; see also `check_arrays`.
    """
    check_arrays(ids)
    capacity = ids.capacity if capacity is None else capacity
    if not isinstance(capacity, Integral) or capacity < 0:
        raise InputError(f"capacity is {capacity!r}; it is the room for one device's ids, so give 0 or more")
    if ids.parts != 1:
        raise InputError(f"the batch is laid out for {ids.parts} devices already; give it as it was before")
    # Those of a device would be cut one by one there, and their lengths added in 32 bits.
    ids = jax.tree.map(np.asarray, ids)
    num_features, num_samples = ids.lengths.shape
    if ids.lengths.size and ids.lengths.min() < 0:
        raise InputError(f"a bag has {ids.lengths.min()} ids; lengths are counts, so give 0 or more")
    num_ids = int(ids.lengths.sum(dtype=np.int64))
    if num_ids > ids.capacity:
        raise InputError(f"lengths add up to {num_ids} ids, but values has {ids.capacity}")
    if num_samples % num_devices:
        raise InputError(
            f"{num_samples} samples do not divide over {num_devices} devices: use a batch size that is a multiple"
        )
    if num_devices == 1 and capacity == ids.capacity:
        return ids
    samples = num_samples // num_devices
    lengths = np.asarray(ids.lengths, np.int64)
    starts = (np.cumsum(lengths) - lengths.reshape(-1)).reshape(lengths.shape)
    # A device's bags of one feature lie side by side already: what moves is runs of them.
    firsts = starts[:, :: max(samples, 1)].T.reshape(-1) if samples else np.zeros(num_features * num_devices, np.int64)
    runs = lengths.reshape(num_features, num_devices, -1).sum(axis=2).T
    ends = runs.cumsum(axis=1)
    most = int(ends.max(initial=0))
    if most > MAX_IDS:
        raise InputError(f"a device has {most} ids of the batch, but 32 bits number {MAX_IDS}: use fewer samples")
    to = (ends - runs + np.arange(num_devices)[:, None] * capacity).reshape(-1)
    kept = np.minimum(runs, np.maximum(capacity - (ends - runs), 0)).reshape(-1)
    values = np.zeros((num_devices * capacity, *ids.values.shape[1:]), ids.values.dtype)
    given = ids.weights
    weights = None if given is None else np.zeros(num_devices * capacity, np.float32)
    for source, target, count in zip(firsts.tolist(), to.tolist(), kept.tolist(), strict=True):
        values[target : target + count] = ids.values[source : source + count]
        if weights is not None and given is not None:
            weights[target : target + count] = given[source : source + count]
    return dataclasses.replace(ids, values=values, weights=weights, parts=num_devices)
