"""`megatron-entropic convert` and `verify`: Hugging Face directories and megatron-core distributed checkpoints.

    FILE.gguf --gguf-to-hf--> HF_DIR        with --verify: are they the same, as transformers reads them?
    HF_DIR --hf-to-megatron--> CHECKPOINT --megatron-to-hf--> HF_DIR        verify: are they the same, bit by bit?
    CHECKPOINT of a run with policy.lora --megatron-to-peft--> ADAPTER_DIR --peft-to-hf, with its model--> HF_DIR

Any tensor, pipeline or expert parallel layout loads a converted checkpoint. See docs/checkpoint_conversion.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_entropic.commands.options import number, whole
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.files.text import printable
from megatron_entropic.observability.transfer import TransferProgress

if TYPE_CHECKING:
    from megatron_entropic.checkpoints.compare import Difference

DIFFERENT = 1
"""Exit status of `verify` when it has found a difference."""
LOGITS_TOLERANCE = 1e-4


def add_parser(commands: Any) -> None:
    """Add `convert`, with its two directions, and `verify` to the subparsers of the command line."""
    convert = commands.add_parser("convert", help="Hugging Face directory to megatron-core checkpoint, and back; GGUF")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")

    there = directions.add_parser("hf-to-megatron", help="to a distributed checkpoint (torch_dist)")
    there.add_argument("--hf-dir", type=Path, required=True, help="Hugging Face directory with safetensors; only read")
    there.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    there.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the output (default: as in the input)")
    there.add_argument("--workers", type=whole(1), default=2, help="threads that read and write (default: %(default)s)")
    there.set_defaults(command=_hf_to_megatron)

    back = directions.add_parser(
        "megatron-to-hf", help="from a conversion, a checkpoint of a run, or one of Megatron-LM's training script"
    )
    back.add_argument("--megatron-dir", type=Path, required=True, help="checkpoint, the folder with .metadata in it")
    back.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    back.add_argument(
        "--hf-template",
        type=Path,
        help="Hugging Face directory of the same model, for configuration and tokenizer (default: the checkpoint "
        "itself, where a conversion put them)",
    )
    back.add_argument(
        "--max-shard-gb", type=number(above=0), default=5.0, help="data per file, GB (default: %(default)s)"
    )
    back.add_argument("--workers", type=whole(1), default=2, help="threads that read and write (default: %(default)s)")
    back.set_defaults(command=_megatron_to_hf)

    merged = directions.add_parser("peft-to-hf", help="a low-rank adapter of peft or of a run merged into its model")
    merged.add_argument("--hf-dir", type=Path, required=True, help="the model that the adapter is for; only read")
    merged.add_argument("--adapter-dir", type=Path, required=True, help="directory with adapter_config.json")
    merged.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    merged.set_defaults(command=_peft_to_hf)

    adapter = directions.add_parser("megatron-to-peft", help="adapters of a run's checkpoint (policy.lora), for peft")
    adapter.add_argument("--megatron-dir", type=Path, required=True, help="checkpoint, the folder with .metadata in it")
    adapter.add_argument("--hf-dir", type=Path, required=True, help="the model that the run began with")
    adapter.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    adapter.set_defaults(command=_megatron_to_peft)

    gguf = directions.add_parser("gguf-to-hf", help="from a GGUF file, dequantised, with tokenizer and chat template")
    gguf.add_argument("--gguf-file", type=Path, required=True, metavar="FILE", help="model in one file; only read")
    gguf.add_argument("--output-dir", type=Path, required=True, help="new directory; appears when it is complete")
    gguf.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the output (default: %(default)s)"
    )
    gguf.add_argument(
        "--verify",
        action="store_true",
        help="afterwards compare parameters, logits and tokens with transformers reading the GGUF file itself; exit "
        "status 1: they differ",
    )
    gguf.set_defaults(command=_gguf_to_hf)

    verify = commands.add_parser(
        "verify",
        help="compare a Hugging Face directory with a distributed checkpoint, bit by bit",
        description="Exit status 0: equal; 1: different, with a table of what differs; 2: they cannot be compared. "
        "Where dtypes differ, the Hugging Face tensor is converted to the checkpoint's before its bits are compared.",
    )
    verify.add_argument("--hf-dir", type=Path, required=True, help="Hugging Face directory with safetensors")
    verify.add_argument("--megatron-dir", type=Path, required=True, help="checkpoint, the folder with .metadata in it")
    verify.add_argument(
        "--logits",
        action="store_true",
        help="also load both, by megatron-core and by transformers, and compare log-probabilities and entropies over "
        "the whole vocabulary (in memory, on the CPU)",
    )
    verify.add_argument("--workers", type=whole(1), default=2, help="threads that compare (default: %(default)s)")
    verify.set_defaults(command=_verify)


def _hf_to_megatron(options: argparse.Namespace) -> None:
    import torch

    from megatron_entropic.checkpoints.convert import hf_to_megatron

    console = Console()
    with TransferProgress("converting to torch_dist", console) as progress:
        hf_to_megatron(
            options.hf_dir,
            options.output_dir,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            workers=options.workers,
            progress=progress,
        )
    _say(console, f"wrote {options.output_dir}")


def _megatron_to_hf(options: argparse.Namespace) -> None:
    from megatron_entropic.checkpoints.convert import megatron_to_hf

    console = Console()
    with TransferProgress("converting to safetensors", console) as progress:
        megatron_to_hf(
            options.megatron_dir,
            options.output_dir,
            template_dir=options.hf_template,
            max_shard_bytes=int(options.max_shard_gb * 1e9),
            workers=options.workers,
            progress=progress,
        )
    _say(console, f"wrote {options.output_dir}")


def _peft_to_hf(options: argparse.Namespace) -> None:
    from megatron_entropic.checkpoints.convert_adapter import peft_to_hf

    console = Console()
    with TransferProgress("merging", console) as progress:
        peft_to_hf(options.hf_dir, options.adapter_dir, options.output_dir, progress=progress)
    _say(console, f"wrote {options.output_dir}")


def _megatron_to_peft(options: argparse.Namespace) -> None:
    from megatron_entropic.checkpoints.convert_adapter import megatron_to_peft

    megatron_to_peft(options.megatron_dir, options.hf_dir, options.output_dir)
    _say(Console(), f"wrote {options.output_dir}")


def _gguf_to_hf(options: argparse.Namespace) -> int:
    import torch

    from megatron_entropic.checkpoints.gguf import compare_with_gguf, gguf_to_hf

    console = Console()
    gguf_to_hf(options.gguf_file, options.output_dir, getattr(torch, options.dtype))
    _say(console, f"wrote {options.output_dir}")
    if not options.verify:
        return 0
    difference = compare_with_gguf(options.gguf_file, options.output_dir)
    for name in difference.differing:
        _say(console, f"differs from the GGUF file: {name}")
    _say(
        console,
        f"{difference.tensors} tensors compared with the GGUF file, {len(difference.differing)} differ; logits within "
        f"{difference.logits:.1e}; tokens and chat template {'agree' if difference.tokens_agree else 'DIFFER'}",
    )
    return 0 if difference.is_equal else DIFFERENT


def _verify(options: argparse.Namespace) -> int:
    from megatron_entropic.checkpoints.compare import compare_weights

    console = Console()
    try:
        with TransferProgress("comparing", console) as progress:
            differences = compare_weights(
                options.hf_dir,
                options.megatron_dir,
                workers=options.workers,
                progress=progress,
            )
        different = [difference for difference in differences if not difference.is_equal]
        if different:
            console.print(_table(different))
        _say(console, f"{len(differences)} tensors compared, {len(different)} differ")
        for (there, here), count in Counter((d.hf_dtype, d.megatron_dtype) for d in differences).items():
            if there != here:
                _say(console, f"{count} of them are {_short(there)} and {_short(here)}: compared as {_short(here)}")
        agree = _logits_agree(options.hf_dir, options.megatron_dir, console) if options.logits else True
    except (OSError, RunError) as error:
        # Their own status means "different" here.
        raise UserError(f"they cannot be compared: {error}") from error
    return 0 if agree and not different else DIFFERENT


def _table(differences: list[Difference]) -> Table:
    table = Table("tensor", "dtypes", "values", "differing", "largest", "NaN", title="Hugging Face / Megatron")
    for one in differences:
        dtypes = [_short(dtype) for dtype in (one.hf_dtype, one.megatron_dtype)]
        table.add_row(
            Text(printable(one.name)),
            " / ".join(dtypes),
            f"{one.values:,}",
            f"{one.differing:,}",
            f"{one.largest:.3g}",
            f"{one.hf_nan:,} / {one.megatron_nan:,}",
        )
    return table


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _logits_agree(hf_dir: Path, megatron_dir: Path, console: Console) -> bool:
    from megatron_entropic.policy.compare_logits import compare_logits

    logprobs, entropies = compare_logits(hf_dir, megatron_dir)
    _say(
        console,
        f"through the models, float32: log-probs within {logprobs:.1e}, entropies within {entropies:.1e} nats "
        f"(tolerance {LOGITS_TOLERANCE:g})",
    )
    return max(logprobs, entropies) <= LOGITS_TOLERANCE


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
