"""Converts a Hugging Face directory to a megatron-core distributed checkpoint (torch_dist).

python tools/checkpoint_convert/hf_to_megatron.py --hf-dir DIR --output-dir DIR [--dtype bfloat16] [--workers N]

Any tensor, pipeline or expert parallel layout loads the result. See docs/checkpoint_conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_entropic.observability.transfer import TransferProgress
from megatron_entropic.weights.conversion import hf_to_megatron


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns the exit status, 1 with one error on stderr if nothing was written."""
    options = _parser().parse_args(arguments)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    console = Console()
    try:
        with TransferProgress("converting to torch_dist", console) as progress:
            hf_to_megatron(
                options.hf_dir,
                options.output_dir,
                dtype=dtype,
                workers=options.workers,
                begin=progress.begin,
                report=progress.advance,
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hf_to_megatron: {error}\n")
        return 1
    console.print(f"wrote {options.output_dir}", soft_wrap=True, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", type=Path, required=True, help="Hugging Face directory with safetensors; only read")
    parser.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the output (default: as in the input)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and write (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
