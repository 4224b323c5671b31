"""Versions of the files that are read back later, perhaps by another version of this package.

    checkpoint       state.json of a checkpoint, which stands for all files beside it
    rollouts         RUN/rollouts/step_NNNNNN.parquet
    evaluation       NAME.parquet and evaluation.json of an evaluation

A file without a version is of before there were any, and is read as version 1. Files of values by name (metrics.jsonl,
samples.jsonl, settings.jsonl, config.yaml) need none: what is not known is passed over, what is missing is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropic import __version__
from megatron_entropic.errors import UserError

_KEY = "format_version"


class NewerFormat(UserError):
    """A file was written by a newer version of this package. It is whole, and is left as it is."""


@dataclass(frozen=True)
class FileFormat:
    """Name and version of the format of one kind of file."""

    name: str
    version: int
    """Number that goes up when earlier versions of the package would misread what is written."""

    def stamp(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content with the version that it is written in."""
        return {_KEY: self.version, **content}

    def read(self, content: Any, path: Path) -> dict[str, Any]:
        """The content of `path` without its version.

        Raises:
            NewerFormat: this version of the package does not know what stands there.
            ValueError, TypeError: it is no object, or its version no number.
        """
        values = dict(content)
        found = values.pop(_KEY, 1)
        if type(found) is not int or found < 1:
            raise ValueError(f"{_KEY} must be a positive integer, found {found!r}")
        if found > self.version:
            raise NewerFormat(
                f"{path}: written by a newer megatron_entropic ({self.name} format {found}; version {__version__} "
                f"reads up to {self.version}). Nothing is wrong with the file and nothing was changed: use the version "
                "that wrote it or a later one"
            )
        return values


CHECKPOINT = FileFormat("checkpoint", 1)
ROLLOUTS = FileFormat("rollouts", 1)
EVALUATION = FileFormat("evaluation", 1)
