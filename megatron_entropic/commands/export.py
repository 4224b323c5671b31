"""`megatron-entropic export`: a trained policy for deployment."""

from __future__ import annotations

import argparse
import datetime
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.commands.options import number, whole
from megatron_entropic.data.prompts import Messages, read_messages
from megatron_entropic.data.rows import Row, RowProblems, read_rows
from megatron_entropic.data.tokenizer import load_tokenizer, render_prompts
from megatron_entropic.errors import UserError, missing_model
from megatron_entropic.files.atomic import appears_when_complete
from megatron_entropic.observability.progress import PhaseDisplay, quiet


def add_parser(commands: Any) -> None:
    """Add `export` to the subparsers of the command line."""
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


# A trained policy in FP8 or INT8 for deployment, by nvidia-modelopt (extra `quant`), and what it costs in KL.
#
#   | HF directory --load--> reference log-probs of the prompts --calibrate, quantise--> log-probs again --> files
#
# modelopt replaces linear layers by ones that round weights and inputs to scales it finds on the calibration prompts.
# KL(policy || quantised policy) is measured token by token on the same prompts, before the files are written. A policy
# that quantising made into another one is not written.

QuantizationFormat = Literal["fp8", "int8", "int8_activations", "nvfp4"]
# On SmolLM2-135M int8 weights cost 0.0028 nats a token, int8 weights and inputs 0.9 (docs/exporting.md): a few channels
# of a layer's inputs are far larger than the others, and one scale for all of them leaves the others few values.
_MODELOPT_CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8": "INT8_WEIGHT_ONLY_CFG",
    "int8_activations": "INT8_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
_COMPANIONS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_TRY_INSTEAD: dict[str, str] = {
    "fp8": "try --quantize int8, which rounds the weights only",
    "int8_activations": "try --quantize int8, which rounds the weights only",
    "nvfp4": "try --quantize int8 or fp8",
    "int8": "try --quantize fp8",
}

MAX_KL = 0.1
"""Mean KL(policy || quantised), in nats a token, above which nothing is written unless the caller allows more."""


@dataclass(frozen=True)
class QuantizationReport:
    """Divergence of the quantised policy from the policy, with the numbers of tokens and prompts behind it."""

    kl_mean: float
    """Mean KL(policy || quantised) of the next-token distributions, nats."""
    kl_max: float
    """Largest KL(policy || quantised) of a single position, nats."""
    tokens: int
    """Number of positions over which the KL was taken."""
    prompts: int
    """Number of prompts that calibrated the scales."""


@dataclass(frozen=True)
class Calibration:
    """Prompts on which the scales are found."""

    file: Path
    """Prompts as parquet or JSON lines, such as the training data."""
    prompt_key: str = "prompt"
    """Column of the prompts in the file."""
    apply_chat_template: bool = False
    """Whether the chat template is applied, as with `data.apply_chat_template` of the run."""
    max_prompts: int = 128
    max_tokens: int = 512
    """Number of tokens to which prompts are cut."""
    kl_tokens: int = 1024
    """Number of positions over which the KL is taken; their log-probs over the whole vocabulary are held in memory."""


def quantize_export(
    source: Path,
    output_dir: Path,
    quantization: QuantizationFormat,
    calibration: Calibration,
    *,
    max_kl: float = MAX_KL,
    begin: Callable[[str], None] = quiet,
) -> QuantizationReport:
    """Quantise a policy and write it as a Hugging Face directory of modelopt's layout.

    Args:
        source: a Hugging Face directory, or the directory of a run that has exported one.
        output_dir: new or empty directory; appears when it is complete.
        quantization: fp8 (weights and inputs E4M3, one scale a tensor), int8 (weights only, a scale a row),
            int8_activations (weights as int8, inputs with one scale a layer), nvfp4 (CUDA only).
        calibration: prompts on which the scales are found.
        max_kl: limit in nats; a mean KL above it is refused, and nothing is written.
        begin: called with words for each part that begins; each takes minutes with a large model.

    Raises:
        UserError: one error that lists everything that is wrong, before a model is loaded; the KL is above `max_kl`.
        ModuleNotFoundError: the extra `quant` is not installed.
        OSError: the output cannot be written.
    """
    begin("reading prompts and the headers of the weights")
    prompts = _checked_prompts(source, output_dir, quantization, calibration)
    modelopt = _modelopt()
    import transformers

    begin("loading the policy")
    hf_dir = find_hf_dir(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype="auto", local_files_only=True, trust_remote_code=False
    )
    model = model.to(device).eval()
    compared = _first_tokens(prompts, calibration.kl_tokens)
    begin("log-probs of the policy")
    reference = [_logprobs(model, tokens) for tokens in compared]

    def calibrate(candidate: torch.nn.Module) -> None:
        for tokens in prompts:
            _logprobs(candidate, tokens)

    begin(f"calibrating on {len(prompts):,} prompts")
    model = modelopt.quantize(model, getattr(modelopt, _MODELOPT_CONFIGS[quantization]), forward_loop=calibrate)
    begin("log-probs of the quantised policy")
    divergence = torch.cat(
        [_kl(before, _logprobs(model, tokens)) for before, tokens in zip(reference, compared, strict=True)]
    )
    report = QuantizationReport(
        float(divergence.mean()), float(divergence.max()), divergence.numel(), prompts=len(prompts)
    )
    refuse_another_policy(report, quantization, max_kl)
    begin("writing")
    _write(model, hf_dir, output_dir)
    return report


def refuse_another_policy(report: QuantizationReport, quantization: QuantizationFormat, max_kl: float) -> None:
    """Refuse a quantised policy whose mean KL is above the limit.

    Raises:
        UserError: the mean KL is above `max_kl` (nats a token), or is not a number.
    """
    if report.kl_mean <= max_kl:
        return
    if math.isnan(report.kl_mean):
        raise UserError(
            f"--quantize {quantization}: the quantised policy gives no numbers (KL is nan), and nothing was written; "
            + _TRY_INSTEAD[quantization]
        )
    # Rounded up, so that the value that is offered is one that passes.
    unit = 10.0 ** (math.floor(math.log10(report.kl_mean)) - 1) if math.isfinite(report.kl_mean) else 1.0
    enough = math.ceil(report.kl_mean / unit) * unit if math.isfinite(report.kl_mean) else math.inf
    raise UserError(
        f"--quantize {quantization}: KL(policy || quantised) is {report.kl_mean:.3g} nats a token (at most "
        f"{report.kl_max:.3g}), above the limit of {max_kl:g}: this is another policy than the one that was "
        f"trained, and nothing was written; {_TRY_INSTEAD[quantization]}, or allow it with --max-kl {enough:.3g}"
    )


def find_hf_dir(source: Path) -> Path:
    """Find the Hugging Face directory: `source` itself, or that of a run: `hf/`, else its newest export.

    Raises:
        UserError: there is none.
    """
    if (source / "config.json").is_file():
        return source
    if not source.exists():
        raise UserError(missing_model(source))
    exports = sorted(path for path in (source / "exports").glob("step_*") if (path / "config.json").is_file())
    for path in (source / "hf", *reversed(exports)):
        if (path / "config.json").is_file():
            return path
    raise UserError(f"{source}: neither a Hugging Face directory nor a run with one in hf/ or exports/")


def _checked_prompts(
    source: Path, output_dir: Path, quantization: QuantizationFormat, calibration: Calibration
) -> list[list[int]]:
    """Tokens of the calibration prompts, after a look at everything that can be refused."""
    problems = RowProblems()
    if quantization == "nvfp4" and not torch.cuda.is_available():
        problems.add("nvfp4: modelopt's block quantisation runs on CUDA only, and there is no GPU; use fp8 or int8")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        problems.add(f"{output_dir}: exists and is not empty; a model is not written over it")
    rows = read_rows([calibration.file], problems)[: calibration.max_prompts]
    prompts: list[Messages] = []
    usable: list[Row] = []
    for row in rows:
        try:
            prompts.append(read_messages(row, calibration.prompt_key))
            usable.append(row)
        except ValueError as error:
            problems.add_row(row, str(error))
    tokens: list[list[int]] = []
    try:
        hf_dir = find_hf_dir(source)
        reader = HfReader(hf_dir)  # every tensor is there and whole
        if reader.parameter_map.dimensions.experts is not None:
            problems.add(f"{hf_dir}: the model has experts, which modelopt cannot export as transformers 5 holds them")
        rendered = render_prompts(
            prompts,
            load_tokenizer(hf_dir),
            apply_chat_template=calibration.apply_chat_template,
            # Of no consequence for the ranges that are measured.
            template_date=datetime.date.today(),
        )
        for row, one in zip(usable, rendered, strict=True):
            if one.problem:
                problems.add_row(row, f"the prompt cannot be used: {one.problem}", one.detail)
        tokens = [one.tokens for one in rendered]
    except ValueError as error:
        problems.add(str(error))
    problems.raise_if_any("the policy cannot be quantised")
    return [ids[: calibration.max_tokens] for ids in tokens if ids]


def _modelopt() -> Any:
    try:
        import modelopt.torch.quantization as modelopt
    except ModuleNotFoundError as error:
        raise UserError(
            f"--quantize needs nvidia-modelopt ({error}): install megatron_entropic with its extra `quant`"
        ) from error
    return modelopt


def _first_tokens(prompts: list[list[int]], limit: int) -> list[list[int]]:
    """The first prompts, whole, that have `limit` tokens together; at least one."""
    chosen: list[list[int]] = []
    for tokens in prompts:
        if chosen and sum(map(len, chosen)) + len(tokens) > limit:
            break
        chosen.append(tokens)
    return chosen


def _logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Log-probs of the token after each position: [len(tokens), vocabulary] float32 on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(torch.tensor([tokens], device=device)).logits[0]
        return logits.float().log_softmax(-1).cpu()


def _kl(reference: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """KL(reference || quantized) in nats, [positions] float64, from log-probs [positions, vocabulary]."""
    return (reference.double().exp() * (reference.double() - quantized.double())).sum(-1)


def _write(model: torch.nn.Module, hf_dir: Path, output_dir: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    with appears_when_complete(output_dir) as partial:
        export_hf_checkpoint(model, export_dir=partial)
        for pattern in _COMPANIONS:
            for source in hf_dir.glob(pattern):
                shutil.copyfile(source, partial / source.name)
