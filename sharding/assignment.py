"""Assignment: candidates and owners of all tables, with the loads that follow.

Letters: Q of `candidates.SPREAD`, W devices, M bins (places for a slice), L devices of a bin.
"""

import dataclasses
from collections.abc import Set

import numpy as np
from jaxtyping import Float, Int

from sharding.candidates import SPREAD, Buffers, Candidate, Choices, to_placement
from sharding.cost import Step
from sharding.layout import Family
from sharding.plan import ShardingPlan

# Improvements below this share of the cost are noise.
NOISE = 1e-9
# A maximum that is less than this share of the cost above its mean is left alone.
WORTH = 5e-5
# What the load of a bin counts for where its maximum stays: little, so that it decides between equals.
_TIE = 1e-6

# A candidate and its bins.
Placed = tuple[Candidate, tuple[int, ...]]
# Seconds, tie, bins, candidate.
Found = tuple[float, float, tuple[int, ...], Candidate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Menu:
    """A table's candidates of one span, as arrays: one row each.

    Attributes:
        candidates: The candidates.
        groups: Their groups.
        profiles: Their profiles.
        fixed: Their fixed seconds.
        sizes: Bytes of a slice on each of its devices, and of the buffers that every device has more.
        most_bytes: The most bytes that a slice can add, with what the group's buffers may grow by.
        cut: Rows of those of several slices.
    """

    candidates: tuple[Candidate, ...]
    groups: Int[np.ndarray, " k"]
    profiles: Float[np.ndarray, "k Q 1 L"]
    fixed: Float[np.ndarray, " k"]
    sizes: Float[np.ndarray, "k 1"]
    most_bytes: float
    cut: tuple[int, ...]


def _menus(candidates: tuple[Candidate, ...], buffers: Buffers) -> tuple[_Menu, ...]:
    by_span: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_span.setdefault(candidate.span, []).append(candidate)
    return tuple(
        _Menu(
            candidates=tuple(members),
            groups=np.array([c.group for c in members]),
            profiles=np.stack([c.profile for c in members])[:, :, None],
            fixed=np.array([c.fixed for c in members]),
            sizes=np.array([[c.owner_bytes + c.fixed_bytes] for c in members]),
            most_bytes=max(c.owner_bytes + c.fixed_bytes + _most_buffers(c, buffers) for c in members),
            cut=tuple(row for row, c in enumerate(members) if c.num_slices > 1),
        )
        for members in by_span.values()
    )


def _most_buffers(candidate: Candidate, buffers: Buffers) -> float:
    """Bytes that buffers grow by, at most, where a slice is added."""
    each = buffers.together[candidate.group] + buffers.in_turn[candidate.group]
    return float(each @ candidate.profile.max(axis=1))


class Assignment:
    """A candidate and its bins for each table, with the loads that follow.

    A bin is what one slice needs: a device, a node, or all devices. The cost is what `candidates.Candidate` counts:
    the sum over groups and quantities of the maximum over devices, and what is the same on every device.

    Attributes:
        candidate: Candidate of each table; None while it has no place.
        bins: Bins of its slices.
        memory: Bytes of a device that stores and buffers may take.
    """

    def __init__(self, choices: Choices, step: Step, memory: float):
        self.choices = choices
        self.step = step
        self.num_devices = num_devices = step.topology.num_devices
        self.memory = memory
        self.candidate: list[Candidate | None] = [None] * len(choices.tables)
        self.bins: list[tuple[int, ...]] = [()] * len(choices.tables)
        self.load = np.zeros((len(choices.groups), len(SPREAD), num_devices))
        self.most = np.zeros((len(choices.groups), len(SPREAD)))
        self.fixed = 0.0
        self.fixed_bytes = 0.0
        self.bytes = np.zeros((len(choices.stores), num_devices))
        self.members = np.zeros(len(choices.groups), np.int64)
        self.cut_members = np.zeros(len(choices.groups), np.int64)
        self._latencies: dict[bytes, float] = {}
        self._menus: dict[int, tuple[_Menu, ...]] = {}

    @property
    def cost(self) -> float:
        """Seconds."""
        return float(self.most.sum()) + self.fixed + self.latency

    @property
    def latency(self) -> float:
        """Seconds that the exchanges of the groups with members take to start."""
        used = (self.members > 0).tobytes() + (self.cut_members > 0).tobytes()
        if used not in self._latencies:
            present: list[tuple[Family, bool]] = [
                (key.family, cut > 0)
                for key, count, cut in zip(
                    self.choices.groups, self.members.tolist(), self.cut_members.tolist(), strict=True
                )
                if count
            ]
            self._latencies[used] = self.step.latency_seconds(present)
        return self._latencies[used]

    @property
    def most_bytes(self) -> float:
        """Bytes of a device, all of which have stores and buffers as large as the fullest."""
        buffers = self.choices.buffers.bytes_of(self.most) + self.fixed_bytes
        return float(self.bytes.max(axis=1).sum()) + buffers

    def room(self, store: int) -> float:
        """Bytes that a device may have in a store, as full as the others are."""
        return self.memory - (self.most_bytes - float(self.bytes[store].max()))

    def let_choose(self, choices: Choices) -> None:
        """From now on, tables may choose among others; groups and stores are the same."""
        self.choices = choices
        self._menus.clear()

    def _add(self, candidate: Candidate, bins: tuple[int, ...], sign: float) -> None:
        load = self.load[candidate.group].reshape(len(SPREAD), -1, candidate.span)
        places = list(bins)
        load[:, places] += sign * candidate.profile[:, None]
        self.bytes[candidate.store].reshape(-1, candidate.span)[places] += sign * candidate.owner_bytes
        self.most[candidate.group] = self.load[candidate.group].max(axis=1)
        self.fixed += sign * candidate.fixed
        self.fixed_bytes += sign * candidate.fixed_bytes
        self.members[candidate.group] += int(sign)
        self.cut_members[candidate.group] += int(sign) * candidate.has_second_pass

    def place(self, candidate: Candidate, bins: tuple[int, ...]) -> None:
        """Gives a table that has no place one."""
        self._add(candidate, bins, 1.0)
        self.candidate[candidate.table] = candidate
        self.bins[candidate.table] = bins

    def remove(self, table: int) -> Placed:
        """Takes a table's place away; returns what it was."""
        candidate, bins = self.candidate[table], self.bins[table]
        if candidate is None:
            raise ValueError(f"table {table} has no place")
        self._add(candidate, bins, -1.0)
        self.candidate[table] = None
        return candidate, bins

    def snapshot(self) -> list[Placed]:
        """Where all tables are."""
        pairs = zip(self.candidate, self.bins, strict=True)
        return [(candidate, bins) for candidate, bins in pairs if candidate is not None]

    def restore(self, held: list[Placed]) -> None:
        """Puts tables where they were."""
        changed = [
            (candidate, bins)
            for candidate, bins in held
            if self.candidate[candidate.table] is not candidate or self.bins[candidate.table] != bins
        ]
        for candidate, _ in changed:
            self.remove(candidate.table)
        for candidate, bins in changed:
            self.place(candidate, bins)

    def best_bins(self, candidate: Candidate, *, lightest: bool = False) -> tuple[float, float, tuple[int, ...]] | None:
        """Where a candidate adds least: seconds, load of the bins, bins; None if memory has no place for it.

        Of bins that add the same, the least loaded.

        Args:
            candidate: The candidate.
            lightest: Whether bytes matter more than seconds; there is always a place then, with room or not.
        """
        before = self.most[candidate.group]
        load = self.load[candidate.group].reshape(len(SPREAD), -1, candidate.span) + candidate.profile[:, None]
        after = np.maximum(load.max(axis=2), before[:, None])
        held = self.bytes[candidate.store].reshape(-1, candidate.span).max(axis=1)
        filled = np.maximum(held + candidate.owner_bytes, held.max()) + candidate.fixed_bytes
        room = self.room(candidate.store)

        def needed(after: Float[np.ndarray, "Q n"], filled: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
            return filled + self.more_buffers(np.array([candidate.group]), (after - before[:, None])[None])[0]

        if candidate.owners is not None:
            chosen = np.array(candidate.owners)
        else:
            sizes = needed(after, filled)
            order = np.lexsort((load.sum(axis=(0, 2)), after.sum(axis=0), sizes if lightest else sizes > room))
            chosen = order[: candidate.num_slices]
        highest = after[:, chosen].max(axis=1)
        if not lightest and needed(highest[:, None], filled[chosen].max(keepdims=True))[0] > room:
            return None
        added = float((highest - before).sum()) + candidate.fixed
        return added, float(load[:, chosen].sum()), tuple(chosen.tolist())

    def cheapest(self, table: int, without: Set[int] = frozenset()) -> Found | None:
        """The cheapest place of a table; see `best_bins`."""
        options = self.choices.of_table[table]
        if options and options[0].owners is not None:
            found = [
                (*place, candidate)
                for candidate in options
                if candidate.group not in without and (place := self.best_bins(candidate)) is not None
            ]
            return min(found, key=lambda entry: entry[:2]) if found else None
        if table not in self._menus:
            self._menus[table] = _menus(options, self.choices.buffers)
        best: Found | None = None
        room = self.room(options[0].store) if options else 0.0
        for menu in self._menus[table]:
            span = menu.candidates[0].span
            load = self.load[menu.groups].reshape(len(menu.groups), len(SPREAD), -1, span)
            most = self.most[menu.groups][:, :, None]
            added = (
                np.maximum((load + menu.profiles).max(axis=3) - most, 0.0)
                if span > 1
                else np.maximum(load[..., 0] + menu.profiles[..., 0] - most, 0.0)
            )
            tie = load.sum(axis=(1, 3))
            seconds = added.sum(axis=1)
            rank = seconds + tie * _TIE
            held = self.bytes[options[0].store].reshape(-1, span).max(axis=1)
            fullest = held.max()
            tight = fullest + menu.most_bytes > room
            if tight:
                filled = np.maximum(held + menu.sizes, fullest)
                rank[filled + self.more_buffers(menu.groups, added) > room] = np.inf
            chosen = rank.argmin(axis=1)
            every = np.arange(len(chosen))
            total = rank[every, chosen] + menu.fixed
            places: dict[int, np.ndarray] = {}
            for row in menu.cut:
                order = rank[row].argsort(kind="stable")[: menu.candidates[row].num_slices]
                places[row] = order
                highest = added[row][:, order].max(axis=1)
                more = float(highest.sum()) + float(tie[row, order].sum()) * _TIE
                total[row] = more + menu.fixed[row] if np.isfinite(rank[row, order[-1]]) else np.inf
                if tight:
                    buffers = self.more_buffers(menu.groups[[row]], highest[None, :, None])
                    if filled[row, order].max() + buffers[0, 0] > room:
                        total[row] = np.inf
            if without:
                total[[candidate.group in without for candidate in menu.candidates]] = np.inf
            row = int(total.argmin())
            if np.isfinite(total[row]) and (best is None or total[row] < best[0]):
                bins = tuple(places[row].tolist()) if row in places else (int(chosen[row]),)
                best = float(total[row]), 0.0, bins, menu.candidates[row]
        return best

    def more_buffers(self, groups: Int[np.ndarray, " k"], more: Float[np.ndarray, "k Q n"]) -> Float[np.ndarray, "k n"]:
        """Bytes that buffers have more where maxima of one of the groups are higher by so many seconds, at most.

        Args:
            groups: The groups.
            more: Seconds, n ways each; where they are fewer, what groups hold in their turn counts as it is.
        """
        buffers = self.choices.buffers
        in_turn = (buffers.in_turn * self.most).max(initial=0.0)
        highest = (buffers.in_turn[groups, :, None] * (self.most[groups, :, None] + more)).max(axis=1)
        return np.einsum("kq,kqn->kn", buffers.together[groups], more) + np.maximum(highest - in_turn, 0.0)

    def to_plan(self, nodes: int, chips: int) -> ShardingPlan:
        """The plan."""
        placements = []
        for table, candidate, bins in zip(self.choices.tables, self.candidate, self.bins, strict=True):
            if candidate is None:
                raise ValueError(f"table {table.name!r} has no place")
            everywhere = candidate.kind in ("row_wise", "data_parallel")
            placements.append(to_placement(candidate, table, () if everywhere else bins))
        return ShardingPlan(nodes=nodes, chips=chips, placements=tuple(placements))


def insert_best(
    assignment: Assignment, table: int, *, first: Candidate | None = None, without: Set[int] = frozenset()
) -> bool:
    """Gives a table without a place the cheapest there is, or none.

    Args:
        assignment: The assignment; changed.
        table: The table.
        first: The candidate to take if it fits.
        without: Groups that are not allowed.

    Returns:
        Whether there is a place.
    """
    if first is not None and (place := assignment.best_bins(first)) is not None:
        assignment.place(first, place[2])
        return True
    found = assignment.cheapest(table, without)
    if found is None:
        return False
    assignment.place(found[3], found[2])
    return True
