"""`megatron-entropic score`: log-probs and entropies of given tokens, by the policy, an engine or transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_entropic.commands.options import number, whole
from megatron_entropic.config.policy import LoraConfig, PolicyConfig
from megatron_entropic.errors import UserError
from megatron_entropic.observability.progress import PhaseDisplay


def add_parser(commands: Any) -> None:
    """Add `score` to the subparsers of the command line."""
    score = commands.add_parser("score", help="log-probs and entropies of given tokens: does training equal rollout?")
    score.add_argument("--hf-dir", type=Path, required=True)
    score.add_argument("--tokens", type=Path, required=True, help='JSON lines {"tokens": [...], "prompt_length": n}')
    score.add_argument("--output", type=Path, required=True, help="JSON lines with logprobs and entropies (nats) added")
    score.add_argument("--backend", choices=["megatron", "vllm", "transformers"], default="megatron")
    score.add_argument("--adapter-dir", type=Path, metavar="DIR", help="adapter of peft or of a run on the model")
    for name in ("tensor", "pipeline", "data", "context", "expert"):
        score.add_argument(f"--{name}-parallel", type=whole(1), default=1, metavar="N")
    for name in ("first", "last"):
        score.add_argument(f"--{name}-stage-layers", type=whole(1), metavar="N", help=f"layers of the {name} stage")
    score.add_argument("--sequence-parallel", action="store_true")
    score.add_argument("--temperature", type=number(above=0), default=1.0)
    score.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    score.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    score.add_argument("--tokens-per-microbatch", type=whole(1), default=16384)
    score.set_defaults(command=_score)


def _score(options: argparse.Namespace) -> None:
    layout = PolicyConfig(
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
        first_stage_layers=options.first_stage_layers,
        last_stage_layers=options.last_stage_layers,
        data_parallel=options.data_parallel,
        context_parallel=options.context_parallel,
        expert_parallel=options.expert_parallel,
        sequence_parallel=options.sequence_parallel,
        tokens_per_microbatch=options.tokens_per_microbatch,
        lora=LoraConfig() if options.adapter_dir is None else _lora(options.adapter_dir),
    )
    parallel = layout.world_size > 1 or layout.sequence_parallel or layout.expert_parallel > 1
    if options.backend != "megatron" and parallel:
        raise UserError(f"--backend {options.backend} runs in one process; parallel layouts need --backend megatron")
    if options.backend != "megatron" and layout.lora.enabled:
        raise UserError(
            f"--backend {options.backend} takes no --adapter-dir: merge it first with `megatron-entropic convert "
            f"peft-to-hf --hf-dir {options.hf_dir} --adapter-dir {options.adapter_dir} --output-dir MERGED`"
        )
    with PhaseDisplay(Console(stderr=True)) as phases:
        phases.begin(f"scoring with {options.backend}")
        _score_with(options, layout)


def _lora(adapter_dir: Path) -> LoraConfig:
    from megatron_entropic.checkpoints.peft_adapter import read_lora_settings

    return read_lora_settings(adapter_dir)


def _score_with(options: argparse.Namespace, layout: PolicyConfig) -> None:
    files = {"hf_dir": options.hf_dir, "tokens_path": options.tokens, "output_path": options.output}
    if options.backend == "megatron":
        from megatron_entropic.policy.score_worker import score_file

        score_file(**files, policy=layout, temperature=options.temperature, dtype=options.dtype, device=options.device)
    elif options.backend == "vllm":
        from megatron_entropic.rollout.score_backend import score_file as score_with_vllm

        score_with_vllm(**files, dtype=options.dtype, temperature=options.temperature)
    else:
        from megatron_entropic.policy.score_transformers import score_file as score_with_transformers

        score_with_transformers(**files, temperature=options.temperature, dtype=options.dtype)
