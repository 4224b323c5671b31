"""Score and update of a 1.5B-shaped policy on one GPU, beside transformers: are they right, and how fast.

    python benchmarks/gpu/policy_gpu.py [--output-dir DIR] [--repetitions N]

    float32, 4 layers    log-probs, entropies and gradients against transformers' forward and autograd
    bfloat16, 28 layers  log-probs of both against float32: is ours further away than transformers'?
    bfloat16, 28 layers  tokens/s and share of the bfloat16 product's rate, of score, update and transformers' step

Weights are random; speed does not depend on them. --device cpu runs the same code with a tiny model: a check of the
script, not of anything else. Writes policy_gpu.json and policy_gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.rates import product_rate, seconds
from benchmarks.machine import cpu_model
from benchmarks.markdown import markdown_table
from benchmarks.policies import batch, random_weights
from megatron_entropic.config.run import Config
from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.megatron.platform import Rendezvous
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence

CONFIG = Path(__file__).resolve().parents[2] / (
    "megatron_entropic/planning/model_configs/OpenReasoning-Nemotron-1.5B.json"
)
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512}
HEADS = ("fused_loss", "recompute", "logits")


@dataclass(frozen=True)
class Sizes:
    """How much is compared and timed."""

    changes: dict[str, int]
    """Entries of config.json that differ from the real model's."""
    sequences: int
    tokens: int
    """Of each timed sequence."""
    compared: tuple[int, ...]
    """Lengths of the sequences that are compared."""


FULL = Sizes(changes={}, sequences=64, tokens=1024, compared=(700, 33, 412, 128, 1024, 5))
SMALL = Sizes(changes=TINY, sequences=4, tokens=32, compared=(17, 5, 32))


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status, 1 where something is further off than its limit."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        Console(stderr=True).print("[bold red]error:[/] this benchmark needs a GPU and torch finds none")
        return 2
    device, sizes = torch.device(options.device), FULL if options.device == "cuda" else SMALL
    console = Console(highlight=False, soft_wrap=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": _name(device), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        found["float32"] = compare_float32(_model(Path(folder) / "float32", sizes, device, layers=4), sizes, device)
        console.print(f"float32: {found['float32']}")
        large = _model(Path(folder) / "bfloat16", sizes, device)
        found["bfloat16"] = compare_bfloat16(large, sizes, device)
        console.print(f"bfloat16: {found['bfloat16']}")
        rate = product_rate(8192 if device.type == "cuda" else 128, device, 10)
        found["product_tflop_per_s"] = rate / 1e12
        found["speed"] = []
        for row in speed(large, sizes, device, options.repetitions):
            row["mfu"] = row["flop"] / row["seconds"] / rate
            found["speed"].append(row)
            console.print(str(row))
            (options.output_dir / "policy_gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (options.output_dir / "policy_gpu.md").write_text(_report(found), encoding="utf-8")
    console.print(f"wrote {options.output_dir / 'policy_gpu.md'}")
    worst = [name for name, value in found["float32"].items() if value > LIMITS[name]]
    if worst:
        console.print(f"[bold red]further off than allowed in float32:[/] {worst}")
    return 1 if worst else 0


LIMITS = {"logprob_max": 2e-4, "entropy_max": 2e-4, "grad_norm_relative": 1e-4, "gradient_relative_max": 2e-3}
"""Of float32 against transformers on the same GPU: sums of thousands of products in another order."""


def compare_float32(hf_dir: Path, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Largest differences from transformers, products in IEEE float32 on both sides."""
    torch.backends.cuda.matmul.allow_tf32 = False
    sequences = _sequences(sizes.compared, read_dimensions(hf_dir))
    with _policy(hf_dir, device, "float32", learning_rate=1e-12) as policy:
        scores = policy.score(sequences)
        assert scores is not None
        pairs = zip(sequences, scores.logprobs, strict=True)
        sequences = [replace(sequence, old_logprobs=logprobs.cpu()) for sequence, logprobs in pairs]
        metrics = policy.update(sequences)
        gradients = _gradients(policy)
    model = _reference(hf_dir, device, torch.float32)
    pairs = [_statistics(model, sequence, device) for sequence in sequences]
    total = sum(sequence.response_length for sequence in sequences)
    # On-policy and without control the gradient of the clipped loss is that of -A log pi, averaged over tokens.
    loss = sum(
        -(logprob @ _advantages(sequence, device)) for (logprob, _), sequence in zip(pairs, sequences, strict=True)
    )
    (loss / total).backward()
    reference = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in reference.values()]).norm().item()
    return {
        "logprob_max": _largest([pair[0] for pair in pairs], scores.logprobs),
        "entropy_max": _largest([pair[1] for pair in pairs], scores.entropies),
        "grad_norm_relative": abs(metrics["grad_norm"] / norm - 1),
        "gradient_relative_max": max(
            float((gradients[name].to(device) - want).norm() / want.norm().clamp_min(1e-6 * norm))
            for name, want in reference.items()
        ),
    }


def compare_bfloat16(hf_dir: Path, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Mean distance of log-probs and entropies from float32 arithmetic on the same weights, ours and transformers'."""
    sequences = _sequences(sizes.compared, read_dimensions(hf_dir))
    with _policy(hf_dir, device, "bfloat16") as policy:
        scores = policy.score(sequences)
    assert scores is not None
    found = {}
    exact_model = _reference(hf_dir, device, torch.float32)
    with torch.no_grad():
        exact = [_statistics(exact_model, sequence, device) for sequence in sequences]
    del exact_model
    rounded_model = _reference(hf_dir, device, torch.bfloat16)
    with torch.no_grad():
        rounded = [_statistics(rounded_model, sequence, device) for sequence in sequences]
    for index, name in enumerate(("logprob", "entropy")):
        ours = scores.logprobs if index == 0 else scores.entropies
        found[f"{name}_ours_mean"] = _mean_distance([pair[index] for pair in exact], ours)
        found[f"{name}_transformers_mean"] = _mean_distance(
            [pair[index] for pair in exact], [pair[index] for pair in rounded]
        )
    return found


def speed(hf_dir: Path, sizes: Sizes, device: torch.device, repetitions: int) -> Iterator[dict[str, Any]]:
    """Seconds, tokens/s and memory of each kind of step over the same tokens."""
    dimensions = read_dimensions(hf_dir)
    tokens = sizes.sequences * sizes.tokens
    sequences = batch(sizes.sequences, sizes.tokens, dimensions.vocab_size)
    forward = tokens * flop_per_token(dimensions, sizes.tokens)
    for head in HEADS:
        with _policy(hf_dir, device, "bfloat16", output_head=head) as policy:
            if head == HEADS[0]:
                yield _row("score", _median(lambda: policy.score(sequences), device, repetitions), tokens, forward)
            policy.score(sequences)
            took = _median(lambda: policy.update(sequences), device, repetitions)
            yield _row(f"update, {head} head", took, tokens, 3 * forward)
    model = _reference(hf_dir, device, torch.bfloat16)
    parameters = list(model.parameters())
    # Equal lengths: a batch without padding, four sequences at a time as logits of more do not fit beside the rest.
    parts = torch.stack([sequence.tokens for sequence in sequences]).to(device).split(4)

    def step(*, backward: bool) -> None:
        for part in parts:
            with torch.set_grad_enabled(backward):
                logits = model(part).logits[:, :-1]
                logprobs = torch.log_softmax(logits.float(), -1).gather(-1, part[:, 1:, None])
                if backward:
                    logprobs.mean().backward()
        for parameter in parameters:
            parameter.grad = None

    yield _row("transformers, forward", _median(lambda: step(backward=False), device, repetitions), tokens, forward)
    took = _median(lambda: step(backward=True), device, repetitions)
    yield _row("transformers, forward and backward", took, tokens, 3 * forward)


def flop_per_token(dimensions: ModelDimensions, tokens: int) -> float:
    """Floating point operations of a token's forward pass: 2 for each parameter of a matrix, and causal attention."""
    shapes = ParameterMap(dimensions).hf_tensors
    matrices = sum(shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    width = dimensions.size("query") + dimensions.size("attended")
    return 2.0 * matrices + tokens * width * dimensions.num_layers


def _row(step: str, seconds: float, tokens: int, flop: float) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"step": step, "seconds": seconds, "tokens_per_s": tokens / seconds, "flop": flop, "peak_gib": peak}


def _median(work: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return statistics.median(seconds(work, device, repetitions))


def _model(directory: Path, sizes: Sizes, device: torch.device, layers: int | None = None) -> Path:
    """A Hugging Face directory of random bfloat16 weights."""
    entries = json.loads(CONFIG.read_text(encoding="utf-8")) | sizes.changes
    if layers is not None:
        entries["num_hidden_layers"] = layers
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    random_weights(directory, torch.bfloat16, device)
    return directory


@contextmanager
def _policy(hf_dir: Path, device: torch.device, dtype: str, **options: Any) -> Iterator[Policy]:
    """A policy of one rank without entropy control, while the block runs."""
    config = Config(
        model={"hf_dir": hf_dir, "dtype": dtype},
        data={"train_files": ["unused"]},
        policy={"output_head": options.get("output_head", "auto"), "tokens_per_microbatch": 8192},
        rollout={"max_response_tokens": 1024, "temperature": 1.0},
        entropy_control={"controller": "off"},
        optimizer={"learning_rate": options.get("learning_rate", 1e-7), "gradient_clip": 0.0, "weight_decay": 0.0},
    )
    made = Policy(config, Rendezvous.alone(), device=device.type)
    try:
        yield made
    finally:
        made.close()
        del made
        gc.collect()
        torch.cuda.empty_cache()


def _gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Gradients of the last update by Hugging Face name: one rank holds them all."""
    from megatron_entropic.policy.model.load import named_entries
    from megatron_entropic.policy.publish.gather import gather_hf_tensors

    entries = named_entries(policy.model, policy.parameter_map, policy.parallel)
    values = {entry.megatron_name: value.main_grad for entry, value in entries if not entry.buffer}
    gathered = gather_hf_tensors(policy.plan, values, policy.parameter_map, policy.parallel, "gradients")
    return {name: tensor.float().cpu() for name, tensor in gathered}


def _reference(hf_dir: Path, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers

    gc.collect()
    torch.cuda.empty_cache()
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def _statistics(model: Any, sequence: Sequence, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropies) [R] of the response."""
    tokens = sequence.tokens.to(device)
    logits = model(tokens[None]).logits[0, sequence.prompt_length - 1 : -1].float()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[sequence.prompt_length :, None]).squeeze(-1), entropy


def _sequences(lengths: tuple[int, ...], dimensions: ModelDimensions) -> list[Sequence]:
    return [batch(1, length, dimensions.vocab_size, seed=number)[0] for number, length in enumerate(lengths, start=1)]


def _advantages(sequence: Sequence, device: torch.device) -> torch.Tensor:
    assert sequence.advantages is not None
    return sequence.advantages.to(device)


def _largest(want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    return max(float((a.detach().cpu() - b.cpu()).abs().max()) for a, b in zip(want, got, strict=True))


def _mean_distance(want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    differences = torch.cat([(a.detach().cpu() - b.cpu()).abs() for a, b in zip(want, got, strict=True)])
    return float(differences.mean())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def _report(found: dict[str, Any]) -> str:
    columns = {"seconds": ".3f", "tokens_per_s": ",.0f", "mfu": ".2f", "peak_gib": ".1f"}
    rows = [[row["step"], *(format(row[name], form) for name, form in columns.items())] for row in found["speed"]]
    parts = [
        f"# A 1.5B-shaped policy on one GPU\n\n{found['device']}, torch {found['torch']}.",
        f"float32, largest differences from transformers: {_figures(found['float32'])}.",
        f"bfloat16, mean distance from float32 arithmetic: {_figures(found['bfloat16'])}.",
        f"Product of bfloat16 matrices: {found['product_tflop_per_s']:.0f} TFLOP/s, of which the share is.",
        markdown_table(["step", "seconds", "tokens/s", "share", "peak, GiB"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2e}" for name, value in values.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure score and update of a 1.5B-shaped policy on one GPU.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="timed ones of each step")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny, to try the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
