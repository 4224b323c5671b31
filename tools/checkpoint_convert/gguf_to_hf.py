"""GGUF file to Hugging Face directory: the command `megatron-entropic convert gguf-to-hf`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_entropic import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """The command with these options, those of the command line by default; returns its exit status."""
    return cli.main(["convert", "gguf-to-hf", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    raise SystemExit(main())
