"""A run's folder of checkpoints and the rule for which of them count. Plain files, no processes: the driver uses it
too.

root/step_00000050/            a checkpoint is a directory that was renamed into place, never written in place
    COMPLETE                   size and SHA-256 of every file; without it the directory does not count
    state.json                 controller, counters, the driver's own state; the version of the whole folder's format
    *.distcp, .metadata, ...   tensors, megatron-core torch_dist
root/step_00000040.damaged/    its files no longer had the sums of its manifest; never read, never deleted
root/.step_00000060.WHO.partial/   being written by WHO, or left by a crash; removed by the next save
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megatron_entropic.checkpoints.checkpoint_pickle import StoredPlace, read_checkpoint_metadata
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.files.atomic import sync
from megatron_entropic.files.formats import CHECKPOINT, NewerFormat

MANIFEST = "COMPLETE"
STATE = "state.json"
CHECKSUM_THREADS = 8
_NAME = re.compile(r"^step_(\d+)$")
_WRITER = re.compile(r"^__(\d+)_\d+\.distcp$")

FindChanged = Callable[[Path], list[str]]
"""Function that reads all files of a checkpoint and returns the names of those that have not the manifest's sums."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read. Checkpoints that were complete before are untouched."""


class MissingSums(CheckpointError):
    """A checkpoint has no sums to compare with: nothing is known to be wrong with it."""


def checkpoint_path(root: Path, step: int) -> Path:
    """Directory of the checkpoint of a step."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest step first; empty when there is no such folder."""
    if not root.is_dir():
        return []
    named = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(named) if (path / MANIFEST).is_file()]


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def refuse_unwanted_resume(resume: str, newest: Path | None) -> None:
    """Refuse to go on after a run's newest checkpoint, if there is one, unless run.resume allows it.

    Raises:
        UserError: it does not.
    """
    if newest is not None and resume == "never":
        raise UserError(f"{newest} exists and run.resume=never; change run.output_dir, or use resume=auto")


def refuse_fewer_steps(steps: int, newest: Path | None) -> None:
    """Refuse a run of `steps` steps in all that has nothing to go on with after its newest checkpoint.

    Raises:
        UserError: it has done more.
    """
    done = step_of(newest)
    if done > steps:
        raise UserError(
            f"train.steps={steps}, but this run has done {done} ({newest}), so nothing is left to train: set "
            f"train.steps above {done}, or choose another run.output_dir"
        )


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for None."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))


def intact_checkpoint(
    root: Path,
    damaged: Callable[[CheckpointError], None],
    *,
    accept_unverified: bool = False,
    find_changed: FindChanged | None = None,
) -> Path | None:
    """The newest complete checkpoint whose files have their sums, or None if there never was one; all of it is read.

    Newer ones that fail are renamed to NAME.damaged, so that they are neither found nor counted again, and `damaged` is
    told of each.

    Args:
        root: folder of the run's checkpoints.
        damaged: hears what is wrong with each one that is set aside.
        accept_unverified: take one that was written without sums, after comparing the sizes of its files.
        find_changed: reads the files; None: `changed_files`, in this process alone.

    Raises:
        CheckpointError: the newest one that is not damaged has no sums, or none is left although there were some: to
            start over would throw the run away. Nothing was renamed.
        NewerFormat: a later version of the package wrote the newest. Nothing was renamed.
    """
    failures: list[tuple[Path, CheckpointError]] = []
    for directory in reversed(complete_checkpoints(root)):
        try:
            verify_checkpoint(directory, find_changed)
        except MissingSums as error:
            if not accept_unverified:
                raise CheckpointError(
                    f"{error}: an older version wrote it. Resume with checkpoint.accept_unverified=true to take it as "
                    "it is, or move it away"
                ) from error
        except CheckpointError as error:
            failures.append((directory, error))
            continue
        for aside, problem in failures:
            _set_aside(aside)
            damaged(problem)
        return directory
    problems = [str(problem) for _, problem in failures]
    problems += [f"{path} was set aside before" for path in _damaged(root)]
    if problems:
        raise CheckpointError(
            f"no checkpoint in {root} can be used:\n  "
            + "\n  ".join(problems)
            + "\nbring one of them back from a copy, "
            "or start over by removing the folder or choosing another run.output_dir"
        )
    return None


def prune_checkpoints(root: Path, keep_last: int, keep_every: int = 0, keep_steps: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` complete checkpoints, and what interrupted saves left behind.

    Checkpoints of steps in `keep_steps`, or that `keep_every` divides, stay; 0 keeps none for that reason.

    Raises:
        ValueError: keep_last < 1.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last must be at least 1, not {keep_last}")
    leftovers = [path for pattern in (".step_*.partial", ".step_*.old") for path in root.glob(pattern)]
    old = complete_checkpoints(root)[:-keep_last]
    step_of = {path: int(path.name.removeprefix("step_")) for path in old}
    gone = [p for p, step in step_of.items() if step not in keep_steps and not (keep_every and step % keep_every == 0)]
    for path in [*leftovers, *gone]:
        # Without its manifest a half-deleted checkpoint cannot be mistaken for a complete one.
        (path / MANIFEST).unlink(missing_ok=True)
        # Its writer may be alive and remove it too.
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def partial_path(directory: Path, writer: str = "") -> Path:
    """Path at which a checkpoint is written before it is renamed to `directory`.

    Each `writer` has a place of its own: ranks that outlived their driver may still be writing when the run goes on.
    """
    return directory.with_name(f".{directory.name}.{writer}.partial")


def begin_checkpoint(directory: Path, writer: str = "") -> Path:
    """Create the empty folder to write to; what an interrupted save by the same writer left is removed."""
    partial = partial_path(directory, writer)
    discard(partial)
    partial.mkdir(parents=True)
    return partial


def discard(directory: Path) -> None:
    """Remove a folder with everything in it, if it exists."""
    if directory.exists():
        shutil.rmtree(directory)


def checksums(paths: list[Path]) -> list[str]:
    """SHA-256 of each file, in hexadecimal; several at a time, since hashing does not hold Python's lock."""
    with ThreadPoolExecutor(max_workers=CHECKSUM_THREADS) as pool:
        return list(pool.map(_checksum, paths))


def finish_checkpoint(
    directory: Path, state: dict[str, Any], sums: dict[str, str] | None = None, writer: str = ""
) -> None:
    """Write `state` and the manifest into the partial folder, flush everything to disk and rename it to `directory`.

    Args:
        directory, writer: as in `begin_checkpoint`.
        state: values that JSON can hold.
        sums: SHA-256 of files that are known, by name; the others' are computed here.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        TypeError: `state` is not JSON.
    """
    partial = partial_path(directory, writer)
    (partial / STATE).write_text(json.dumps(CHECKPOINT.stamp(state), indent=1), encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    names = [str(path.relative_to(partial)) for path in files]
    known = sums or {}
    unknown = [name for name in names if name not in known]
    known = known | dict(zip(unknown, checksums([partial / name for name in unknown]), strict=True))
    manifest = {
        "files": {name: path.stat().st_size for name, path in zip(names, files, strict=True)},
        "sha256": {name: known[name] for name in names},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, partial / MANIFEST, partial]:
        sync(path)
    replaced = directory.with_name(f".{directory.name}.old")
    discard(replaced)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    sync(directory.parent)
    discard(replaced)


def verify_checkpoint(directory: Path, find_changed: FindChanged | None = None) -> None:
    """Compare the content of every file with the manifest.

    Args:
        directory: a complete checkpoint.
        find_changed: reads the files, after their names and sizes were compared; None: `changed_files`.

    Raises:
        MissingSums: all files are there in their sizes, but the manifest has no sums.
        CheckpointError: names the files that are missing or changed.
        NewerFormat: a later version of the package wrote it.
    """
    read_state(directory)
    try:
        _sums(directory)  # says at once if there are none
        changed = (find_changed or changed_files)(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be verified: {error!r}") from error
    if changed:
        raise CheckpointError(f"checkpoint {directory} is damaged: {', '.join(changed)} changed after it was written")


def changed_files(directory: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Names of the files that have not the sums of the manifest, among the share of one of so many ranks.

    A file on a bad part of a disk counts as changed.

    Raises:
        MissingSums: the manifest has none.
        OSError: a file is not there or may not be read.
    """
    sums = _sums(directory)
    names = share_of_rank(list(sums), rank, ranks)
    found = checksums([directory / name for name in names])
    return [name for name, actual in zip(names, found, strict=True) if actual != sums[name]]


def share_of_rank(names: list[str], rank: int, ranks: int) -> list[str]:
    """Those of a checkpoint's files that a rank compares; every file belongs to one rank.

    What a rank wrote, the rank of its number reads: under the same layout it loads that next, which its node then has
    in memory. The others are dealt out.
    """
    written = {name: int(match[1]) for name in names if (match := _WRITER.match(name))}
    dealt = {name: number for number, name in enumerate(sorted(set(names) - set(written)))}
    return [name for name in names if (written | dealt)[name] % ranks == rank]


def _sums(directory: Path) -> dict[str, str]:
    """SHA-256 of each file by name, from the manifest.

    Raises:
        MissingSums: an older version wrote it, without them.
    """
    sums: dict[str, str] | None = json.loads((directory / MANIFEST).read_text(encoding="utf-8")).get("sha256")
    if sums is None:
        raise MissingSums(f"checkpoint {directory} was written without checksums")
    return sums


def read_state(directory: Path) -> dict[str, Any]:
    """The contents of state.json of a checkpoint, after comparing its files with the manifest.

    Raises:
        CheckpointError: not a complete checkpoint; names the files that are missing or have another size.
        NewerFormat: a later version of the package wrote it.
    """
    try:
        _state(directory)
    except NewerFormat:  # before the manifest, which may have another form as well
        raise
    except (OSError, ValueError, TypeError):
        pass  # the manifest says what is wrong with it
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        problems = [
            f"{name} has {_size(directory / name)} bytes instead of {size}"
            for name, size in manifest.items()
            if _size(directory / name) != size
        ]
        if problems:
            raise CheckpointError(f"checkpoint {directory} is damaged: {'; '.join(problems)}")
        return _state(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} is not a complete checkpoint: {error}") from error


def _state(directory: Path) -> dict[str, Any]:
    path = directory / STATE
    return CHECKPOINT.read(json.loads(path.read_text(encoding="utf-8")), path)


def _damaged(root: Path) -> list[Path]:
    """Checkpoints that were set aside, oldest step first."""
    return sorted(path for path in root.glob("step_*.damaged") if _NAME.match(path.stem))


def _set_aside(directory: Path) -> None:
    aside = directory.with_name(f"{directory.name}.damaged")
    discard(aside)
    directory.rename(aside)


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return str(error)  # as no sum is: its contents are lost


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# Whether a checkpoint is data alone, found before megatron-core loads it.
#
# Loading it runs pickles without limits: torch reads `.metadata` with `pickle.load` and every object that is no tensor
# (random state, extra state of layers) with `torch.load(weights_only=False)`. Whoever can put a folder into a run's
# output_dir could run commands so; a checkpoint that a colleague or a download provided is such a folder. `common.pt`
# is loaded by megatron-core with weights only.

_EXTRA_STATE = "._extra_state"


def check_only_data(directory: Path) -> None:
    """Refuse a checkpoint of which anything but tensors, numbers and texts would be made.

    Raises:
        CheckpointError: naming the file and what it holds; or it cannot be read.
    """
    try:
        metadata = read_checkpoint_metadata(directory / ".metadata", only_known=True)
        if (directory / "common.pt").is_file():
            _load_data(directory / "common.pt", (directory / "common.pt").read_bytes(), "its contents")
        for place in metadata.places:
            if place.name in metadata.objects:
                _check_object(directory, place)
    except (OSError, UserError) as error:
        raise CheckpointError(f"checkpoint {directory} is not loaded: {error}") from error


def _check_object(directory: Path, place: StoredPlace) -> None:
    path = directory / place.file
    with path.open("rb") as file:
        file.seek(place.start)
        value = _load_data(path, file.read(place.length), place.name)
    # Transformer Engine's layers unpickle their extra state themselves; without FP8 it is empty.
    if _EXTRA_STATE in place.name and not _is_empty(value):
        raise UserError(f"{path}: {place.name} is not empty: a layer's own state (of FP8) is not supported")


def _load_data(path: Path, data: bytes, name: str) -> Any:
    """The value of `data`, which `torch.save` wrote, if torch makes it without calling anything.

    Raises:
        UserError: it is more than data, or damaged.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).split("\n\n")[0]
        raise UserError(
            f"{path}: {name} cannot be loaded as mere data; use only checkpoints of your own: {reason}"
        ) from error


def _is_empty(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if isinstance(value, io.BytesIO):
        return not value.getvalue()
    # megatron-core wraps an object in a list of one.
    return value is None or (isinstance(value, list | tuple) and all(_is_empty(item) for item in value))
