"""An evaluation by engines alone, without a policy: the work of `megatron-entropic evaluate`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.cluster.launch import launch_engines
from megatron_entropic.cluster.sampling import DealtOut, Sampler
from megatron_entropic.config.run import Config
from megatron_entropic.data import load_checked_tokenizer
from megatron_entropic.evaluation.summary import BenchmarkSummary
from megatron_entropic.files.paths import make_directory
from megatron_entropic.observability.progress import PhaseDisplay
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.training.evaluator import Evaluator, model_identity
from megatron_entropic.training.preconditions import open_environments


def evaluate(config: Config, directory: Path, label: str) -> list[BenchmarkSummary]:
    """Answer the benchmarks of `evaluation.benchmarks` that `directory` does not hold yet, and summarise all of them.

    Each benchmark is stored when it is complete, so an evaluation that was stopped repeats at most one of them; seeds
    belong to responses, so the numbers are those of an evaluation that was not stopped.

    Args:
        config: model, benchmarks, engines, verifier.
        directory: folder for responses and numbers.
        label: name of the model in tables.

    Raises:
        ValueError: benchmarks that cannot be used, or a directory with other settings' responses.
        RunError: engines or verifier could not start or died.
    """
    # Numbers go to stdout, which can be a file; what is going on goes to the person who waits.
    with PhaseDisplay(Console(stderr=True)) as phases:
        phases.begin("reading model and benchmarks")
        HfReader(config.model.hf_dir)  # vLLM reads some incomplete or ambiguous checkpoints without a word
        model = model_identity(config.model.hf_dir)
        tokenizer = load_checked_tokenizer(config.model.hf_dir)
        evaluator = Evaluator(config, tokenizer)
        pending = evaluator.pending(directory, model)
        if pending:
            make_directory(directory)
            with (
                ExitStack() as closing,
                RewardScorer(config.reward) as scorer,
                launch_engines(config, phases.begin) as cluster,
            ):
                sampler = Sampler(config, DealtOut(cluster), tokenizer, open_environments(config, closing))
                for name in pending:
                    responses = len(evaluator.problems[name]) * config.evaluation.samples(name)
                    phases.begin(f"answering {name}: responses", total=responses)
                    evaluator.answer(name, sampler, scorer, directory, model, phases.count)
                phases.begin("ending the engines")
        phases.begin("summarising")
        return evaluator.summarise(directory, label)
