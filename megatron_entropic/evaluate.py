"""`megatron-entropic evaluate`: engines alone, no policy."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_entropic.cluster.launch import launch_engines
from megatron_entropic.config import Config
from megatron_entropic.data import load_checked_tokenizer
from megatron_entropic.evaluation.summary import BenchmarkSummary
from megatron_entropic.evaluator import Evaluator, model_identity
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.weights.hf_io import HfReader

logger = logging.getLogger(__name__)


def evaluate(config: Config, directory: Path, label: str) -> list[BenchmarkSummary]:
    """Answer the benchmarks of `evaluation.benchmarks` that `directory` does not hold yet, and summarise all of them.

    Each benchmark is stored when it is complete, so an evaluation that was stopped repeats at most one of them; seeds
    belong to responses, so the numbers are those of an evaluation that was not stopped.

    Args:
        config: model, benchmarks, engines, verifier.
        directory: where responses and numbers go.
        label: name of the model in tables.

    Raises:
        ValueError: benchmarks that cannot be used, or a directory with other settings' responses.
        RunError: engines or verifier could not start or died.
    """
    HfReader(config.model.hf_dir)  # vLLM reads some incomplete or ambiguous checkpoints without a word
    model = model_identity(config.model.hf_dir)
    evaluator = Evaluator(config, load_checked_tokenizer(config.model.hf_dir))
    pending = evaluator.pending(directory, model)
    if pending:
        directory.mkdir(parents=True, exist_ok=True)
        with RewardScorer(config.reward) as scorer, launch_engines(config) as engines:
            for name in pending:
                logger.info("answering %s", name)
                evaluator.answer(name, engines, scorer, directory, model)
    return evaluator.summarise(directory, label)
