"""Tokens, micro-batches and the pipeline's idle time of one training step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_entropic.config.run import Config

MEAN_PROMPT_SHARE = 0.25
"""Assumed mean prompt over data.max_prompt_tokens: competition problems have 100 to 300 tokens."""

MEAN_RESPONSE_SHARE = 0.5
"""Assumed mean response over rollout.max_response_tokens. Times scale with it; memory does not depend on it."""


DEVIATION_SHARE = 0.5
"""Assumed standard deviation of the responses over their mean: a guess. It makes the tail of a generation."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the sequences of a training step, in tokens."""

    prompt_mean: float
    response_mean: float
    response_deviation: float | None = None
    """Standard deviation of the responses; None: half of their mean (`DEVIATION_SHARE`)."""


def assumed_lengths(config: Config) -> Lengths:
    """The lengths of a run of which nothing has been measured."""
    return Lengths(
        max(1.0, MEAN_PROMPT_SHARE * config.data.max_prompt_tokens),
        max(1.0, MEAN_RESPONSE_SHARE * config.rollout.max_response_tokens),
    )


@dataclass(frozen=True)
class Schedule:
    """Parts of one training step, counted. Means are assumptions (this module's constants)."""

    responses: int
    """Number of responses of one training step."""
    optimizer_steps: int
    mean_prompt_tokens: float
    mean_response_tokens: float
    response_deviation: float
    """Standard deviation of the lengths of responses, in tokens."""
    microbatches: int
    """Expected number of micro-batches of an optimizer step on each data-parallel replica."""
    microbatches_at_most: int
    """Number of micro-batches if every sequence had the greatest length."""
    tokens: float
    """Expected number of tokens of a micro-batch."""
    largest_tokens: int
    """The most tokens that a micro-batch can have."""
    bubble_fraction: float

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of a sequence."""
        return self.mean_prompt_tokens + self.mean_response_tokens


def in_flight(stages: int, stage: int, microbatches: int, chunks: int = 1) -> int:
    """Number of pairs of a micro-batch and a chunk whose activations a stage (from 0) keeps at once.

    1F1B: one for each stage behind it and its own. Interleaved: two for each stage behind it, `stages` for each chunk
    but one, and its own (megatron-core's warm-up).
    """
    if chunks == 1:
        return min(stages - stage, microbatches)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, chunks * microbatches)


def bubble_fraction(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Share of a step that a stage waits: (p - 1) / (v m + p - 1), for p stages of v chunks and m micro-batches.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, with the whole step as the denominator.
    """
    return (stages - 1) / (chunks * microbatches + stages - 1)


def make_schedule(config: Config, lengths: Lengths | None = None) -> Schedule:
    """The schedule of a configuration; without `lengths` those of `assumed_lengths`."""
    policy, lengths = config.policy, lengths or assumed_lengths(config)
    prompt, response = lengths.prompt_mean, lengths.response_mean
    deviation = lengths.response_deviation
    per_replica = -(-config.sequences_per_optimizer_step // policy.data_parallel)
    # Interleaved stages run them in groups of one for each stage.
    multiple = policy.pipeline_parallel if policy.virtual_pipeline_parallel > 1 else 1
    expected, at_most = (
        -(-_microbatches(per_replica, policy.tokens_per_microbatch, length) // multiple) * multiple
        for length in (prompt + response, config.max_sequence_tokens)
    )
    return Schedule(
        responses=config.rollout.samples_per_step,
        optimizer_steps=config.algorithm.optimizer_steps_per_rollout,
        mean_prompt_tokens=prompt,
        mean_response_tokens=response,
        response_deviation=DEVIATION_SHARE * response if deviation is None else deviation,
        microbatches=expected,
        microbatches_at_most=at_most,
        tokens=per_replica * (prompt + response) / expected,
        largest_tokens=max(policy.tokens_per_microbatch, config.max_sequence_tokens),
        bubble_fraction=bubble_fraction(policy.pipeline_parallel, expected, policy.virtual_pipeline_parallel),
    )


def _microbatches(sequences: int, budget_tokens: int, length: float) -> int:
    """Number of micro-batches: sequences of one length share one while they fit; a longer one is alone."""
    return -(-sequences // max(1, int(budget_tokens // length)))
