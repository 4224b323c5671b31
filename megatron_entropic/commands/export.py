"""`megatron-entropic export`: a trained policy for deployment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_entropic.commands.options import number, whole
from megatron_entropic.observability.phases import PhaseDisplay


def add_export_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    export = commands.add_parser("export", help="a trained policy in FP8 or INT8 for deployment (extra `quant`)")
    export.add_argument("source", type=Path, metavar="RUN_OR_HF_DIR")
    export.add_argument(
        "--quantize",
        required=True,
        choices=["fp8", "int8", "int8_activations", "nvfp4"],
        help="int8: weights only; int8_activations: weights and inputs, at a far larger KL",
    )
    export.add_argument("--output-dir", type=Path, required=True)
    export.add_argument("--calibration", type=Path, required=True, help="prompts: the training data, parquet or JSON")
    export.add_argument("--prompt-key", default="prompt", help="column of the prompts (default: prompt)")
    export.add_argument("--apply-chat-template", action="store_true", help="as data.apply_chat_template of the run")
    export.add_argument("--max-prompts", type=whole(1), default=128, help="that calibrate (default: 128)")
    export.add_argument("--max-tokens", type=whole(1), default=512, help="of each prompt (default: 512)")
    export.add_argument(
        "--max-kl",
        type=number(least=0),
        default=0.1,
        metavar="NATS",
        help="mean KL(policy || quantised) a token above which nothing is written (default: 0.1)",
    )
    export.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> None:
    from megatron_entropic.commands.quantized_export import Calibration, quantize_export

    calibration = Calibration(
        options.calibration,
        prompt_key=options.prompt_key,
        apply_chat_template=options.apply_chat_template,
        max_prompts=options.max_prompts,
        max_tokens=options.max_tokens,
    )
    with PhaseDisplay(Console(stderr=True)) as phases:
        report = quantize_export(
            options.source,
            options.output_dir,
            options.quantize,
            calibration,
            max_kl=options.max_kl,
            begin=phases.begin,
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{options.quantize}: {options.output_dir}, calibrated on {report.prompts} prompts")
    console.print(
        f"KL(policy || quantised): mean {report.kl_mean:.2e}, max {report.kl_max:.2e} nats over {report.tokens} tokens"
    )
