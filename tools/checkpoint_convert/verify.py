"""Compares a Hugging Face directory with a megatron-core distributed checkpoint, tensor by tensor and bit by bit.

python tools/checkpoint_convert/verify.py --hf-dir DIR --megatron-dir DIR [--logits]

Exit status 0: equal; 1: different, with a table of what differs; 2: they could not be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_entropic.errors import RunError
from megatron_entropic.observability.transfer import TransferProgress
from megatron_entropic.weights.compare import Difference, compare_weights

LOGITS_TOLERANCE = 1e-4


def main(arguments: list[str] | None = None) -> int:
    """Compare; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        with TransferProgress("comparing", console) as progress:
            differences = compare_weights(
                options.hf_dir,
                options.megatron_dir,
                workers=options.workers,
                begin=progress.begin,
                report=progress.advance,
            )
        different = [difference for difference in differences if not difference.is_equal]
        if different:
            console.print(_table(different))
        console.print(f"{len(differences)} tensors compared, {len(different)} differ", highlight=False)
        agree = _logits_agree(options.hf_dir, options.megatron_dir, console) if options.logits else True
    except (ValueError, OSError, RunError) as error:
        sys.stderr.write(f"verify: {error}\n")
        return 2
    return 0 if agree and not different else 1


def _table(differences: list[Difference]) -> Table:
    table = Table("tensor", "dtypes", "values", "differing", "largest", "NaN", title="Hugging Face / Megatron")
    for one in differences:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (one.hf_dtype, one.megatron_dtype)]
        table.add_row(
            one.name,
            " / ".join(dtypes),
            f"{one.values:,}",
            f"{one.differing:,}",
            f"{one.largest:.3g}",
            f"{one.hf_nan:,} / {one.megatron_nan:,}",
        )
    return table


def _logits_agree(hf_dir: Path, megatron_dir: Path, console: Console) -> bool:
    from megatron_entropic.policy.compare_logits import compare_logits

    logprobs, entropies = compare_logits(hf_dir, megatron_dir)
    console.print(
        f"through the models, float32: log-probs within {logprobs:.1e}, entropies within {entropies:.1e} nats "
        f"(tolerance {LOGITS_TOLERANCE:g})",
        highlight=False,
    )
    return max(logprobs, entropies) <= LOGITS_TOLERANCE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", type=Path, required=True, help="Hugging Face directory with safetensors")
    parser.add_argument("--megatron-dir", type=Path, required=True, help="checkpoint, the folder with .metadata in it")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also load both, by megatron-core and by transformers, and compare log-probabilities and entropies over "
        "the whole vocabulary (in memory, on the CPU)",
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that compare (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
