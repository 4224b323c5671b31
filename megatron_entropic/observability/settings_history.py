"""Under which settings each part of a run was computed: RUN/settings.jsonl, one object for each part.

    {"first_step": 1, "config": {...}, "directory": "/where/it/was/started", "contents": {"data.train_files": "1f0c"}}

A part begins at the start of the run and at every resume under other settings. Runs of older versions have no such
file; all of their steps count as one part under config.yaml.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.files.atomic import write_text
from megatron_entropic.files.jsonl import read_json_lines

SETTINGS_FILE = "settings.jsonl"
_SAMPLED_BYTES = 1 << 20
ABSENT = "not there"
"""Stand-in for the value of a setting that one of two configurations does not have."""


_BESIDE_THE_STEPS = (
    "run.name",
    "run.output_dir",
    "run.resume",
    "train.steps",
    "train.record_steps",
    "train.max_skipped_steps",
    "checkpoint.",
    "cluster.",
    "evaluation.",
    "logging.",
)
"""Settings that say how long, where and with which records a run goes on."""

_ROUNDS_THE_STEPS = ("cluster.cpu_threads",)
"""Settings among them that change the last bits of a step."""


@dataclass(frozen=True)
class RunPart:
    """Consecutive steps of a run under the same settings."""

    first_step: int
    config: dict[str, Any]
    """The resolved configuration."""
    directory: str = ""
    """Directory in which the command was started; empty where it is not known."""
    contents: dict[str, str] = field(default_factory=dict)
    """A digest of what lies under the paths of a setting, by its dotted key: files can change under the same name."""


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    key: str
    old: str
    new: str

    @property
    def acts_on_steps(self) -> bool:
        """Whether a step computed under the new value may be another one."""
        return self.key in _ROUNDS_THE_STEPS or not self.key.startswith(_BESIDE_THE_STEPS)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def read_parts(run_dir: Path) -> list[RunPart]:
    """The parts of a run by first step; empty if the run has none recorded.

    Raises:
        UserError: the file is damaged; naming the line.
    """
    path = run_dir / SETTINGS_FILE
    if not path.is_file():
        return []
    parts: dict[int, RunPart] = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        first, config, contents = row.get("first_step"), row.get("config"), row.get("contents", {})
        if type(first) is not int or not isinstance(config, dict) or not isinstance(contents, dict):
            raise UserError(f"{path}, line {number}: expected an object with first_step and config")
        parts[first] = RunPart(first, config, str(row.get("directory", "")), contents)
    return [parts[first] for first in sorted(parts)]


def record_part(run_dir: Path, part: RunPart, before: Sequence[RunPart]) -> list[Change]:
    """Record that the run goes on under these settings, if they are other ones; returns what has changed.

    Parts that begin at the same step or later are forgotten, as their steps will be computed again.

    Args:
        before: parts of the run that were recorded.
    """
    kept = [earlier for earlier in before if earlier.first_step < part.first_step]
    changed = changes(kept[-1], part) if kept else []
    if changed or not kept:
        kept.append(part)
    if kept != list(before):
        _write(run_dir / SETTINGS_FILE, kept)
    return changed


def parts_of_steps(parts: Sequence[RunPart]) -> list[RunPart]:
    """The parts that may have computed other steps than the one before, such as at another learning rate.

    A part that goes on for longer or writes more belongs to the one before it.
    """
    pairs = pairwise(parts)
    return [*parts[:1], *(new for old, new in pairs if any(change.acts_on_steps for change in changes(old, new)))]


def changes(old: RunPart, new: RunPart) -> list[Change]:
    """Settings whose values differ, in the order of the configuration, then paths with other contents."""
    found = differences(old.config, new.config)
    paths = [key for key in new.contents if key in old.contents and old.contents[key] != new.contents[key]]
    told = {change.key for change in found}
    return found + [Change(key, "the files as they were", "other contents") for key in paths if key not in told]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Settings of two configurations whose values differ."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = dict.fromkeys([*after, *before])
    return [
        Change(key, _words(before.get(key, ABSENT)), _words(after.get(key, ABSENT)))
        for key in keys
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of everything in a configuration that is no section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def sampled_digest(paths: Iterable[Path]) -> str:
    """Fingerprint of files or folders, without reading all of them: names, sizes, first and last MiB of each file."""
    digest = hashlib.sha256()
    for root in paths:
        files = sorted(path for path in root.iterdir() if path.is_file()) if root.is_dir() else [root]
        for path in files:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name}/{size}/".encode(errors="surrogateescape"))
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def model_files(hf_dir: Path) -> list[Path]:
    """The files of a Hugging Face directory that a run reads: configuration, tokenizer with its template, weights."""
    patterns = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt")
    return sorted(path for pattern in patterns for path in hf_dir.glob(pattern))


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _write(path: Path, parts: Sequence[RunPart]) -> None:
    write_text(path, "".join(json.dumps(asdict(part), ensure_ascii=False, default=str) + "\n" for part in parts))
