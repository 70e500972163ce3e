"""Cuts: inequalities that every plan obeys and that the linear programme of `sharding.lower_bound` does not know of.

A cut says of group g and quantity q, with P_g vectors a sample on the fullest bin (a device, or a node for tables that
are spread over its chips)::

    Z_gq >= sum_tc coefficient_tc x_tc - coefficient P_g

The packing cut is about any set S of candidates whose slices, K in all, do not fill the W bins. Let a_c be the seconds
of a slice, k_c its number of slices, each on a bin of its own, and v_c its vectors. Take the bins that hold slices of
S, and others until there are K. What is in them, besides S? At least ``o_c = max(0, k_c + K - W)`` slices of a
candidate c, as W - K bins have no room for more; and of all vectors at least those for which the W - K other bins, of
at most P_g each, have no room. No vector has fewer seconds than s, but for those that are counted as what they are. So
for any s >= 0, since a maximum is at least the mean over K bins::

    K Z_gq >= sum_S k_c a_c x_c + sum_others (a_c o_c + min(s v_c, a_c) (k_c - o_c)) x_c - s (W - K) P_g

A nest says that no slice is divisible: with m_i the seconds of a slice of any members of a group, falling, ``Z_gq >=
sum_i (m_i - m_i+1) x_i``. Where tables are whole, and i is the first member with x_i = 1, the sum is at most m_i.

The last kind adds up what tables of skewed ids leave on a device. Slices of D devices, or of a multiple of D, begin at
a multiple of D, so together they add the same to the devices of one place, those whose number mod D it is, wherever
they are. A maximum is at least the mean over these W / D, and what smaller slices add is at least nothing. With h_c the
seconds that a slice adds to them, for the candidates c whose slices are such::

    Z_gq >= (D / W) sum_c k_c h_c x_c

Where users say that tables are on one device, its load is what they add to it, b_c::

    Z_gq >= sum_c b_c x_c
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from sharding.candidates import SPREAD, Candidate, Choices
from sharding.cost_settings import VECTORS

VECTORS_PLACE = SPREAD.index(VECTORS)
# By how much a cut has to be broken, in units of seconds.
_BROKEN = 0.03
# Values of s that are tried, shares of a candidate from which it may be in S, and cuts of one group and quantity at a
# time.
_MOST_SIZES = 40
_LEAST_SHARE = 0.05
_MOST_CUTS = 3
# What sums in two orders may differ by.
_CLOSE = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """``Z >= values @ x[members] - of_vectors * P``.

    Attributes:
        group: Number of the group.
        quantity: Place of the quantity in `SPREAD`.
        members: Columns of x.
        values: Their coefficients.
        of_vectors: The coefficient of P.
    """

    group: int
    quantity: int
    members: Int[np.ndarray, " m"]
    values: Float[np.ndarray, " m"]
    of_vectors: float = 0.0


class Cuts:
    """The candidates as arrays, one row each, and the cuts that have been found.

    Attributes:
        groups: Group of each.
        slices: Column slices, k.
        spans: Devices of a slice.
        peaks: Units of seconds of a slice on the device where it adds most, by quantity.
        means: The same, averaged over the devices of a slice: a.
        vectors: Vectors a sample of a slice: v.
        members: Candidates of each group.
        bins: Bins of each group, W; 1 where its candidates have different ones.
    """

    def __init__(self, choices: Choices, num_devices: int, unit: float):
        self.candidates = candidates = [candidate for options in choices.of_table for candidate in options]
        self.num_devices, self.unit = num_devices, unit
        self.groups = np.array([c.group for c in candidates])
        self.slices = np.array([c.num_slices for c in candidates])
        self.spans = np.array([c.span for c in candidates])
        self.peaks = np.array([c.profile.max(axis=1) for c in candidates]) / unit
        self.means = np.array([c.profile.mean(axis=1) for c in candidates]) / unit
        seconds = np.array(choices.vector_seconds) / unit
        self.counts_vectors = (seconds > 0) & [key.family in ("table_wise", "table_row_wise") for key in choices.groups]
        each = np.where(self.counts_vectors, seconds, np.inf)[self.groups]
        self.vectors = np.round(self.peaks[:, VECTORS_PLACE] / each, 9)
        self.members = [np.flatnonzero(self.groups == group) for group in range(len(choices.groups))]
        self.bins = [
            num_devices // int(self.spans[mine[0]]) if len(set(self.spans[mine].tolist())) == 1 else 1
            for mine in self.members
        ]
        self._shared = _shared_devices(choices, self.candidates, unit)
        self._found: set[tuple[int, ...]] = set()
        self._places: dict[tuple[int, int, int], np.ndarray] = {}

    def broken(
        self,
        x: Float[np.ndarray, " candidates"],
        z: Float[np.ndarray, "groups Q"],
        most_vectors: Float[np.ndarray, " groups"],
    ) -> Iterator[Cut]:
        """The cuts that a solution breaks and that were not found before."""
        # A slice alone is the simplest nest: many at a time, so that few solves do.
        for candidate, quantity in np.argwhere(x[:, None] * self.peaks > z[self.groups] + _BROKEN).tolist():
            if self._is_new(0, candidate, quantity):
                yield Cut(
                    group=int(self.groups[candidate]),
                    quantity=quantity,
                    members=np.array([candidate]),
                    values=self.peaks[candidate, quantity, None],
                )
        for number, (group, members, added) in enumerate(self._shared):
            load = x[members] @ added
            for quantity in np.flatnonzero(load > z[group] + _BROKEN).tolist():
                if self._is_new(4, number, quantity):
                    yield Cut(group=group, quantity=quantity, members=members, values=added[:, quantity])
        for group in np.unique(self.groups[x > 1e-6]).tolist():
            for quantity in range(len(SPREAD)):
                least = z[group, quantity] + _BROKEN
                if self.peaks[self.members[group], quantity].max() > 0:
                    yield from self._nests(group, quantity, x, least)
                    if self.bins[group] > 1 and quantity != VECTORS_PLACE:
                        yield from self._packings(group, quantity, x, least, float(most_vectors[group]))
                    if self.spans[self.members[group]].max() > 1:
                        yield from self._hot_rows(group, quantity, x, least)

    def _is_new(self, *key: int) -> bool:
        new = key not in self._found
        self._found.add(key)
        return new

    def _nests(self, group: int, quantity: int, x: np.ndarray, least: float) -> Iterator[Cut]:
        mine = self.members[group]
        order = mine[np.argsort(-self.peaks[mine, quantity], kind="stable")]
        peaks = self.peaks[order, quantity]
        highest = np.maximum.accumulate(x[order])
        if float(highest @ -np.diff(peaks, append=0.0)) <= least:
            return
        # Those that are more chosen than all that are larger.
        records = np.flatnonzero(np.diff(highest, prepend=0.0) > 0)
        steps = -np.diff(peaks[records], append=0.0)
        members = order[records[steps > 0]]
        if self._is_new(1, group, quantity, *members.tolist()):
            yield Cut(group=group, quantity=quantity, members=members, values=steps[steps > 0])

    def _packings(self, group: int, quantity: int, x: np.ndarray, least: float, most_vectors: float) -> Iterator[Cut]:
        """S: the largest that are chosen, so and so many of them."""
        mine, bins = self.members[group], self.bins[group]
        seconds, slices, vectors = self.means[mine, quantity], self.slices[mine], self.vectors[mine]
        chosen = np.flatnonzero(x[mine] > _LEAST_SHARE)
        chosen = chosen[np.argsort(-seconds[chosen], kind="stable")]
        sizes = np.zeros(1)
        if self.counts_vectors[group]:
            sizes = np.unique(np.append(seconds[chosen] / np.maximum(vectors[chosen], 1.0), 0.0))
            if len(sizes) > _MOST_SIZES:
                sizes = np.unique(np.append(np.quantile(sizes, np.linspace(0.0, 1.0, _MOST_SIZES)), 0.0))
        fill = np.minimum(sizes[:, None] * vectors, seconds)
        counts = np.cumsum(slices[chosen])
        counts = counts[counts < bins]
        # Most numbers of slices break nothing, which sums over prefixes tell of all at once: what others are counted
        # for where each may be outside of the bins of S, and what S is counted for beyond that.
        outside = fill * slices * x[mine]
        beyond = (seconds * slices * x[mine] - outside)[:, chosen[: len(counts)]]
        reached = outside.sum(axis=1)[:, None] + np.cumsum(beyond, axis=1)
        # Unless one has so many slices that the other bins have no room for all.
        crowded = counts > bins - slices.max()
        highest = ((reached - sizes[:, None] * (bins - counts) * most_vectors) / counts).max(axis=0)
        found: list[tuple[float, int, int, np.ndarray]] = []
        for place in np.flatnonzero(crowded | (highest > least * (1.0 - _CLOSE))).tolist():
            held = int(counts[place])
            inside = np.maximum(slices + held - bins, 0)
            values = seconds * inside + fill * (slices - inside)
            values[:, chosen[: place + 1]] = (seconds * slices)[chosen[: place + 1]]
            total = (values @ x[mine] - sizes * (bins - held) * most_vectors) / held
            best = int(total.argmax())
            if total[best] > least:
                found.append((float(total[best]), held, best, values[best] / held))
        for _, held, best, values in sorted(found, key=lambda entry: -entry[0])[:_MOST_CUTS]:
            used = np.flatnonzero(values > 1e-9)
            large = np.flatnonzero(values[used] >= (seconds * slices)[used] / held * (1 - 1e-9))
            if self._is_new(2, group, quantity, held, int(sizes[best] * 1e6), *mine[used[large]].tolist()):
                yield Cut(
                    group=group,
                    quantity=quantity,
                    members=mine[used],
                    values=values[used],
                    of_vectors=float(sizes[best]) * (bins - held) / held,
                )

    def _hot_rows(self, group: int, quantity: int, x: np.ndarray, least: float) -> Iterator[Cut]:
        mine = self.members[group]
        for span in sorted(set(self.spans[mine].tolist()) - {1}):
            at_places = self._at_places(group, quantity, span)
            load = x[mine] @ at_places
            place = int(load.argmax())
            if load[place] > least and self._is_new(3, group, quantity, span, place):
                yield Cut(group=group, quantity=quantity, members=mine, values=at_places[:, place])

    def _at_places(self, group: int, quantity: int, span: int) -> Float[np.ndarray, "m span"]:
        """What a group's candidates add to the devices of each place, on average, or less; the same in every round."""
        key = group, quantity, span
        if key not in self._places:
            added = self._places[key] = np.zeros((len(self.members[group]), span))
            for row, member in enumerate(self.members[group].tolist()):
                candidate = self.candidates[member]
                if candidate.span % span == 0:
                    added[row] = candidate.num_slices * candidate.profile[quantity].reshape(-1, span).sum(axis=0)
            added *= span / self.num_devices / self.unit
        return self._places[key]


def _shared_devices(
    choices: Choices, candidates: Sequence[Candidate], unit: float
) -> list[tuple[int, Int[np.ndarray, " m"], Float[np.ndarray, "m Q"]]]:
    """For each device that users put tables on: a group, its candidates there, and what each adds."""
    held: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    # Tables that are together are where one of them is pinned, or on a device without a number.
    together: dict[int, int] = {}
    for number, tables in enumerate(choices.together):
        pinned = (c.owners[0] for table in tables for c in choices.of_table[table] if c.owners)
        together |= dict.fromkeys(tables, next(pinned, -1 - number))
    for member, candidate in enumerate(candidates):
        owners = (together[candidate.table],) if candidate.table in together else candidate.owners or ()
        for owner in owners:
            for place in range(candidate.span):
                device = owner * candidate.span + place
                held.setdefault((candidate.group, device), []).append((member, candidate.profile[:, place]))
    return [
        (group, np.array([member for member, _ in added]), np.array([seconds for _, seconds in added]) / unit)
        for (group, _), added in held.items()
    ]
