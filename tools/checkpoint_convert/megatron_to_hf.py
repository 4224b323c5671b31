"""Converts a megatron-core distributed checkpoint (torch_dist) to a Hugging Face directory.

python tools/checkpoint_convert/megatron_to_hf.py --megatron-dir DIR --output-dir DIR [--hf-template DIR]

Takes what hf_to_megatron.py wrote, checkpoints of a run and those of Megatron-LM's training script. The result loads in
transformers and vLLM. See docs/checkpoint_conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_entropic.observability.transfer import TransferProgress
from megatron_entropic.weights.conversion import megatron_to_hf


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns the exit status, 1 with one error on stderr if nothing was written."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        with TransferProgress("converting to safetensors", console) as progress:
            megatron_to_hf(
                options.megatron_dir,
                options.output_dir,
                template_dir=options.hf_template,
                max_shard_bytes=int(options.max_shard_gb * 1e9),
                workers=options.workers,
                begin=progress.begin,
                report=progress.advance,
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"megatron_to_hf: {error}\n")
        return 1
    console.print(f"wrote {options.output_dir}", soft_wrap=True, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-dir", type=Path, required=True, help="checkpoint, the folder with .metadata in it")
    parser.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    parser.add_argument(
        "--hf-template",
        type=Path,
        help="Hugging Face directory of the same model, for configuration and tokenizer (default: the checkpoint "
        "itself, where a conversion put them)",
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="data per file, GB (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and write (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
