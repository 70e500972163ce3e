"""Checkpoints of a run: the tables first, then dense state and progress, whose arrival commits both.

A checkpoint of step s is ``tables/s`` (sharding/checkpoint.py) and ``checkpoints/s`` (orbax, which renames the folder
into place when it is complete, and out of the way before it deletes it). Killed at any moment, a run has only complete
steps in ``checkpoints``; a folder of tables without one is rubbish that the next start removes. All that a checkpoint
holds is on the disk before its folder gets its name, so that the same is true of a power cut.
"""

import asyncio
import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dlrm_jax.save_errors import check_room
from dlrm_jax.train_state import TrainState
from dlrm_jax.workdir import Workdir
from sharding import InputError, ShardedTables
from sharding.checkpoint import restore_tables, save_tables
from sharding.mesh import REPLICATED, sharding_on
from sharding.whole_file import to_disk

# Checkpoints on their way out, since one that is half deleted must not look complete.
_DELETED = "deleted"
_RESIDUAL = "residual"
# Leaves whose first axis is as long as the mesh has it: parts of devices; the samples of a batch that they divide.
_OF_THE_MESH = (_RESIDUAL, "stale.")
# What orbax writes beside the numbers: names, shapes, shardings.
_ROOM_FOR_METADATA = 2**17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run knows beside its state. The position in the data follows from the step.

    Attributes:
        best_score: Best score of an evaluation so far, higher being better; None before the first.
        best_step: Its step.
        evaluations_since_best: Evaluations since then.
    """

    best_score: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


@dataclasses.dataclass(kw_only=True)
class _BestStep(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of the best evaluation, which orbax's own policy forgets from one run to the next."""

    step: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: checkpoint_managers.PreservationContext
    ) -> Sequence[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _OnDisk(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder that orbax renames into place once its files are on the disk.

    Orbax itself leaves those that tensorstore does not write to the operating system: a power cut would keep the new
    name and lose what the files hold.
    """

    async def finalize(self) -> None:
        """Renames it."""
        await asyncio.to_thread(_all_to_disk, Path(self.get()))
        await super().finalize()
        # Before an older checkpoint is deleted: the name, and the time of the commit, which no restoration needs.
        final = Path(self.get_final())
        await asyncio.to_thread(_all_to_disk, final)
        await asyncio.to_thread(to_disk, final.parent)


class RemovedError(InputError):
    """A checkpoint was removed while it was read."""


class Checkpointer:
    """The checkpoints of one run. A context manager."""

    def __init__(self, workdir: Path, tables: ShardedTables, *, keep: int = 2, read_only: bool = False):
        """Opens the folders of a run, and removes what an interrupted save left there.

        Args:
            workdir: Folder of the run.
            tables: The tables that are saved and restored.
            keep: Latest checkpoints to keep beside the best.
            read_only: Whether to leave the folders as they are.

        Raises:
            InputError: There is nothing to read.
        """
        self._workdir = Workdir(workdir.resolve())
        self._read_only = read_only
        self._folder = workdir.resolve() / "tables"
        self._sharded_tables = tables
        path = workdir.resolve() / "checkpoints"
        if read_only and not path.is_dir():
            raise InputError(f"{workdir}: has no checkpoint; train with scripts/train.py first")
        self._best = _BestStep()
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), self._best]
                ),
                enable_async_checkpointing=False,
                todelete_subdir=None if read_only else _DELETED,
                # Its `read_only` does as much, and logs warnings each time.
                cleanup_tmp_directories=not read_only,
                # Else it asks for the time of each checkpoint, of which a training may have removed one meanwhile.
                lightweight_initialize=read_only,
                create=not read_only,
                temporary_path_class=_OnDisk,
            ),
            item_handlers={"dense": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
        )
        if not read_only:
            self._remove_uncommitted()

    def __enter__(self) -> "Checkpointer":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes orbax's manager."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Writes a checkpoint, and removes those that are no longer to be kept. Returns when it is complete.

        Args:
            state: The state.
            progress: What else the run knows.
        """
        step = int(state.step)
        if step in self.steps():
            return
        folder = self._folder / str(step)
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        _wait_for_others(f"tables of step {step}")
        save_tables(self._sharded_tables, state.tables, folder)
        leaves = _dense_leaves(state)
        if jax.process_index() == 0:
            check_room(self._workdir, sum(leaf.nbytes for leaf in leaves.values()) * 9 // 8 + _ROOM_FOR_METADATA)
        self._best.step = progress.best_step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                dense=ocp.args.StandardSave(leaves),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
        )
        self._manager.wait_until_finished()
        self._remove_uncommitted()

    def progress(self, step: int) -> Progress:
        """Reads the progress of a checkpoint.

        Args:
            step: Its step.

        Returns:
            What the run knew.

        Raises:
            InputError: The checkpoint is damaged.
            RemovedError: It was removed meanwhile.
        """
        with self._reading(step):
            saved = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
            if set(saved) != {field.name for field in dataclasses.fields(Progress)}:
                raise ValueError(f"its progress is {saved}")
            return msgspec.convert(saved, Progress)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state of a checkpoint, bit for bit.

        Args:
            step: Its step.
            abstract: Shapes and shardings of the state.

        Returns:
            The state.

        Raises:
            InputError: There is no such checkpoint, it is of another model, or damaged.
            RemovedError: It was removed meanwhile.
        """
        if step not in self.steps():
            raise InputError(f"no checkpoint of step {step} in {self._manager.directory}; there are {self.steps()}")
        leaves, shapes, residual = _dense_leaves(abstract), self._saved_shapes(step), abstract.residual
        for name, leaf in leaves.items():
            if name in shapes and name.startswith(_OF_THE_MESH):
                leaves[name] = self._as_saved(leaf, shapes[name])
        self._check_model(step, shapes, leaves)
        with self._reading(step):
            saved = self._manager.restore(step, args=ocp.args.Composite(dense=ocp.args.StandardRestore(leaves)))
        if residual is not None:
            saved["dense"][_RESIDUAL] = _shared_out(saved["dense"][_RESIDUAL], residual)
        try:
            tables = restore_tables(self._sharded_tables, self._folder / str(step))
        except InputError as error:
            raise self._unreadable(step, str(error)) from error
        without_tables = dataclasses.replace(abstract, tables=None)
        dense = jax.tree.unflatten(jax.tree.structure(without_tables), [saved["dense"][name] for name in leaves])
        return dataclasses.replace(dense, tables=tables)

    def _saved_shapes(self, step: int) -> dict[str, tuple[Any, ...]]:
        """Dtype and shape of each leaf of the checkpoint's dense state."""
        with self._reading(step):
            tree = self._manager.item_metadata(step).dense.tree
            return {name: (leaf.dtype, *leaf.shape) for name, leaf in tree.items()}

    def _as_saved(self, leaf: jax.ShapeDtypeStruct, saved: tuple[Any, ...]) -> jax.ShapeDtypeStruct:
        """A leaf as a mesh of another number of devices has saved it; every device gets all of that."""
        length = saved[1]
        if length == leaf.shape[0]:
            return leaf
        replicated = sharding_on(self._sharded_tables.mesh, REPLICATED)
        return jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype, sharding=replicated)

    def _check_model(
        self, step: int, saved: dict[str, tuple[Any, ...]], leaves: dict[str, jax.ShapeDtypeStruct]
    ) -> None:
        """Raises InputError if the checkpoint's dense state has other leaves than the model's."""
        expected = {name: (leaf.dtype, *leaf.shape) for name, leaf in leaves.items()}
        for name in sorted(set(saved) | set(expected)):
            was, now = (
                leaf and f"{leaf[0]} of shape {list(leaf[1:])}" for leaf in (saved.get(name), expected.get(name))
            )
            if was != now:
                raise InputError(
                    f"{self._manager.directory}/{step}: {name} is {was or 'not there'}, but {now or 'not there'} in "
                    "the model; use the config that it was trained with"
                )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        shown = sys.unraisablehook
        if getattr(shown, "func", None) is not _without_late_reads:
            sys.unraisablehook = partial(_without_late_reads, shown)
        try:
            yield
            sys.unraisablehook = shown
        except Exception as error:  # orbax raises what its parts raise, and Exception itself
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            what = f"{self._manager.directory}/{step}: is damaged ({reason}); use another checkpoint"
            # The hook stays: other reads that are still under way may end at any time.
            raise self._unreadable(step, what) from error

    def _unreadable(self, step: int, what: str) -> InputError:
        """The error of a checkpoint that cannot be read: what is wrong with it, if it is still there."""
        steps = self._workdir.checkpoint_steps()
        if step not in steps:
            return RemovedError(
                f"{self._manager.directory}/{step}: was removed while it was read, as a training removes old "
                f"checkpoints; use another: there are {steps}"
            )
        return InputError(f"{what}: {self._instead(step)}")

    def _instead(self, step: int) -> str:
        """What to do without a checkpoint."""
        others = [other for other in self.steps() if other != step]
        if self._read_only:
            return f"there are {others}" if others else "there is no other, so train again"
        before = max((other for other in others if other < step), default=None)
        goes_on = "train anew" if before is None else f"go on from step {before:,}"
        return f"remove {self._manager.directory}/{step} to {goes_on}"

    def _remove_uncommitted(self) -> None:
        if jax.process_index() == 0:
            self._remove_uncommitted_alone()
        _wait_for_others("removal of incomplete checkpoints")

    def _remove_uncommitted_alone(self) -> None:
        shutil.rmtree(Path(self._manager.directory) / _DELETED, ignore_errors=True)
        committed = {str(step) for step in self._manager.all_steps()}
        if self._folder.is_dir():
            for folder in self._folder.iterdir():
                if folder.name not in committed:
                    shutil.rmtree(folder)


def _all_to_disk(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        to_disk(path)


def _without_late_reads(shown: Callable[[Any], Any], unraisable: Any) -> None:
    """Shows what nobody could catch; not that a read of tensorstore ended after orbax had given up on another."""
    if str(unraisable.exc_value) != "Event loop is closed":
        shown(unraisable)


def _wait_for_others(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _dense_leaves(state: TrainState) -> dict[str, Any]:
    """Everything but the tables, by the name of its path."""
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.replace(state, tables=None))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shared_out(residual: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The residual for this mesh: equal shares of what all devices owe together, since only that sum counts."""
    if residual.shape == wanted.shape:
        return residual
    return jax.jit(
        lambda parts: jnp.broadcast_to(jnp.sum(parts, axis=0)[None] / wanted.shape[0], wanted.shape),
        out_shardings=wanted.sharding,
    )(residual)
