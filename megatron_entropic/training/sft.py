"""A short supervised run before reinforcement learning, through the same Megatron policy."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from megatron_entropic.config.run import Config
from megatron_entropic.data import PromptForm, WarmStartPairs
from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.types import Sequence

if TYPE_CHECKING:  # what is read before a start needs no Ray
    from megatron_entropic.cluster.cluster import Cluster
    from megatron_entropic.training.lifecycle import StopRequest
    from megatron_entropic.training.run_directory import RunDirectory


def warm_start_sequences(config: Config, tokenizer: Tokenizer) -> list[list[Sequence]]:
    """Make the sequences of each supervised step, a function of the file and the seed; empty without a warm start.

    Raises:
        ValueError: listing every row of the file that cannot be used.
    """
    settings = config.warm_start
    if not settings.steps or settings.file is None:
        return []
    form = PromptForm.of(config.data)
    pairs = WarmStartPairs(settings.file, tokenizer, config.max_sequence_tokens, form=form)
    draw = random.Random(config.run.seed)
    return [
        [_sequence(*pairs[index]) for index in draw.choices(range(len(pairs)), k=settings.sequences_per_step)]
        for _ in range(settings.steps)
    ]


def warm_start(cluster: Cluster, run: RunDirectory, steps: list[list[Sequence]], stop: StopRequest) -> int:
    """Train by maximum likelihood, one optimizer step for each list; returns the step the run starts from, 0.

    Afterwards the optimizer is fresh, with the schedule of `optimizer`, and the result is a checkpoint: a run that is
    stopped later does not learn this again.
    """
    if not steps:
        return 0
    with cluster.training() as policy:
        for step, sequences in enumerate(steps, start=1):
            stop.raise_if_asked()  # what is learnt so far is learnt again: there is no checkpoint within a warm start
            run.journal.record_warm_start(step, policy.warm_start_step(sequences))
        policy.begin_reinforcement_learning()
    run.checkpoints.save(cluster, 0)
    return 0


def _sequence(prompt: list[int], response: list[int]) -> Sequence:
    return Sequence(tokens=torch.tensor(prompt + response, dtype=torch.int64), prompt_length=len(prompt))
