"""Recorded rollouts as a person looks at them: token by token, with entropy and what the entropy control touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_entropic.errors import UserError
from megatron_entropic.observability.records import RecordedResponse, RecordedStep
from megatron_entropic.observability.values import as_number
from megatron_entropic.reports.pages import render_page

Touch = Literal["", "up", "down"]
"""Whether pi > tau and A != 0, and the sign of A: "" where either is not so, up for A > 0, down for A < 0."""


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token of a response, with what the page shows of it."""

    text: str
    entropy: float
    """Entropy of the policy at this position, in nats; NaN where the environment wrote the token, as all below."""
    probability: float
    """Probability pi(token) before the step's first update."""
    engine_probability: float
    touch: Touch

    @property
    def given(self) -> bool:
        """Whether the environment wrote it."""
        return self.entropy != self.entropy


@dataclass(frozen=True, slots=True)
class ResponseView:
    """One response, with what the page shows of it."""

    recorded: RecordedResponse
    answer: str | None
    """The verifier's reading of the response; None if it found no answer."""
    tokens: list[TokenView]
    hidden: int
    """Number of tokens left out of the middle of `tokens`, at `cut`."""
    cut: int

    @property
    def advantage(self) -> float:
        """Advantage of the first token; the same for all where advantages are relative to the group."""
        return float(self.recorded.advantages[0]) if self.recorded.advantages.size else 0.0

    @property
    def mean_entropy(self) -> float:
        """Mean entropy over all tokens, in nats."""
        return float(self.recorded.entropies.mean()) if self.recorded.entropies.size else 0.0

    @property
    def turn_entropies(self) -> list[float]:
        """Mean entropy of each turn, in nats; empty where there is one turn only."""
        turns = self.recorded.trajectory.turn_numbers
        if not turns.size or turns[-1] < 2:
            return []
        return [float(self.recorded.entropies[turns == turn].mean()) for turn in range(1, turns[-1] + 1)]

    @property
    def touched(self) -> float:
        """Share of the shown tokens of the policy that the control touches."""
        written = [token for token in self.tokens if not token.given]
        return sum(token.touch != "" for token in written) / max(1, len(written))


@dataclass(frozen=True, slots=True)
class GroupView:
    """The responses to one prompt."""

    index: int
    prompt: str
    ground_truth: Any
    responses: list[ResponseView]


@dataclass(frozen=True, slots=True)
class StepView:
    """Some prompts of a step, with what the page shows of the step."""

    step: int
    alpha: float | None
    tau: float | None
    """Threshold of the entropy control; None where no control acts through tokens with pi > tau."""
    entropy_scale: float
    """Entropy that is shown in the strongest colour: the 99th percentile of the step's tokens, nats."""
    prompts: int
    """Number of prompts in the step."""
    groups: list[GroupView]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """How much of a step is shown."""

    prompts: Sequence[int] = ()
    """Indices of prompts; empty: the first ones of the step, those whose rewards differ before the others."""
    max_prompts: int = 2
    """Number of prompts shown when none are named."""
    max_tokens: int = 2000
    """Most tokens shown of a response; from a longer one the middle is left out."""


def view_step(
    recorded: RecordedStep,
    tokenizer: Any,
    read_answer: Callable[[str], str | None],
    *,
    tau: float | None,
    excerpt: Excerpt = Excerpt(),
) -> StepView:
    """Choose prompts of a recorded step and prepare what is shown of them.

    Args:
        recorded: the step.
        read_answer: function: response -> the answer that the verifier takes from it, None without one.
        tau: threshold of the entropy control; None if it acts on no token.
        excerpt: how much is shown.

    Raises:
        UserError: a prompt that is not in the step; naming some that are.
    """
    groups = [(members[0].trajectory.task.index, members) for members in recorded.by_task()]
    present = [index for index, _ in groups]
    missing = [index for index in excerpt.prompts if index not in present]
    if missing:
        some = ", ".join(map(str, present[:10]))
        raise UserError(f"step {recorded.step} has no prompt {', '.join(map(str, missing))}; it has {some}, ...")
    # Groups whose rewards are all alike have no advantage and teach nothing; sorting keeps the order of the step.
    with_signal_first = sorted(groups, key=lambda group: len({member.reward.value for member in group[1]}) < 2)
    named = [group for group in groups if group[0] in excerpt.prompts]
    chosen = named if excerpt.prompts else with_signal_first[: excerpt.max_prompts]
    entropies = np.concatenate([response.entropies for response in recorded.responses])
    return StepView(
        step=recorded.step,
        alpha=as_number(recorded.metrics.get("entropy/alpha"), None),
        tau=tau,
        entropy_scale=max(float(np.quantile(entropies, 0.99)) if entropies.size else 0.0, 1e-6),
        prompts=len(groups),
        groups=[
            GroupView(
                index,
                members[0].trajectory.task.text,
                members[0].trajectory.task.ground_truth,
                [
                    _response(one, tokenizer, read_answer(one.trajectory.text), tau, excerpt.max_tokens)
                    for one in members
                ],
            )
            for index, members in chosen
        ],
    )


def rollouts_page(view: StepView, *, title: str, path: Path) -> str:
    """HTML page of a step, whose rollouts are in the file `path`."""
    return render_page(Path(__file__).with_name("rollouts.html.jinja"), title=title, view=view, path=path)


def token_texts(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; together they are the text of all.

    A character can be spread over several tokens of a byte-level vocabulary: it is given to the last of them.
    """
    texts: list[str] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        whole = not text.endswith("\ufffd")
        texts.append(text if whole else "")
        pending = [] if whole else pending
    if pending:
        texts[-1] = tokenizer.decode(pending)
    return texts


def _response(
    recorded: RecordedResponse, tokenizer: Any, answer: str | None, tau: float | None, max_tokens: int
) -> ResponseView:
    trajectory = recorded.trajectory
    count = trajectory.continuation_length
    hidden = max(0, count - max_tokens)
    cut = (count - hidden) // 2
    texts = token_texts(trajectory.continuation.tolist(), tokenizer)
    values = np.full((4, count), np.nan, np.float32)
    written = slice(None) if trajectory.mask is None else trajectory.mask
    values[:, written] = (
        recorded.entropies,
        np.exp(recorded.old_logprobs),
        np.exp(trajectory.rollout_logprobs),
        recorded.advantages,
    )
    tokens = []
    for position in range(count):
        if not cut <= position < cut + hidden:
            entropy, probability, engine, advantage = values[:, position].tolist()
            touch = _touch(probability, advantage, tau)
            tokens.append(TokenView(texts[position], entropy, probability, engine, touch))
    return ResponseView(recorded, answer, tokens, hidden, cut)


def _touch(probability: float, advantage: float, tau: float | None) -> Touch:
    if tau is None or not probability > tau or advantage == 0:
        return ""
    return "up" if advantage > 0 else "down"
