"""The controller as another trainer sees it: sums of a window of tokens in, steering of the next optimizer step out.

    scoring pass or the previous step's window --begin--> Steering --advantages, coefficient--> optimizer step --end--+
                        ^                                                                                            |
                        '------------------------------- the step's own window --------------------------------------'

Hosts differ in where they measure and in how they hand the steering to their loss; what happens between the two is
here, and is what our own trainer's `policy.step.control` does with the same numbers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megatron_entropic.algorithms import Steering, build_controller, entropic_term
from megatron_entropic.config.names import controller_entry
from megatron_entropic.errors import Problems, UserError, reading
from megatron_entropic.files.atomic import write_text

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig

STATE_FILE = "entropy_control.json"
"""Name of the file that a host's checkpoint gets beside its own."""
_logger = logging.getLogger(__name__)


class HostedControl:
    """One replica of a controller in another trainer; replicas that are fed the same sums stay equal bit for bit.

    Args:
        settings: keys of our configuration's section `entropy_control`, such as {"target": 0.5, "kp": 1.0}.
        host: name of the trainer, for messages.
        lacks: fields of `Steering` that the host can do nothing about, each with the reason.
        ratio_clip: value of `ratio_clip` that the host's loss comes to.

    Attributes:
        steering: what the current optimizer step shall do.

    Raises:
        UserError: settings that are unknown, out of range, or of no effect in this host; all in one message.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        host: str,
        lacks: Mapping[str, str] | None = None,
        ratio_clip: Literal["none", "ppo"] = "ppo",
    ) -> None:
        self._host = host
        self._lacks = dict(lacks or {})
        self.config = read_settings(settings, host=host, lacks=self._lacks, ratio_clip=ratio_clip)
        self.controller = build_controller(self.config)
        self.steering = Steering()
        self._feedback: tuple[float, float] | None = None
        self._begun = False

    @property
    def has_measurement(self) -> bool:
        """Whether a step has ended, or a scoring pass come, so that the next can begin."""
        return self._feedback is not None

    @property
    def wants_score(self) -> bool:
        """Whether the coming optimizer step needs a scoring pass: `feedback: score_pass`, or nothing measured yet."""
        return self.config.feedback == "score_pass" or self._feedback is None

    def begin(self, scored: Sequence[float] | None = None) -> Steering:
        """Fix what the coming optimizer step does.

        Args:
            scored: `window_sums` of a scoring pass, summed over ranks; None where the previous step's window counts.

        Raises:
            ValueError: nothing was measured yet, or what was measured is not finite.
            UserError: a controller of somebody's own asks for what the host cannot do.
        """
        if scored is not None:
            self._feedback = (float(scored[0]), float(scored[1]))
        if self._feedback is None:
            raise ValueError("entropy control has no measurement yet: score the batch before the first update")
        self.steering = self.controller.observe(*self._feedback)
        for name, reason in self._lacks.items():
            if getattr(self.steering, name) != getattr(Steering(), name):
                raise UserError(f"entropy control in {self._host}: the controller asks for {name}: {reason}")
        self._begun = True
        return self.steering

    def end(self, window: Sequence[float], *, stepped: bool) -> None:
        """Advance the controller after an optimizer step, whose window is the next step's measurement.

        A step without `begin`, a run's first in a host that measures only while it updates, was not steered; it counts.

        Args:
            window: `window_sums` of the step, summed over ranks.
            stepped: whether the optimizer changed the weights.
        """
        entropy_sum, tokens, with_advantage = map(float, window)
        # Sums that are not finite come from the broken forward pass of a skipped step; those before it stay.
        usable = tokens > 0 and math.isfinite(entropy_sum)
        if not self._begun and usable:
            self.controller.observe(entropy_sum, tokens)
        if self._begun or usable:
            self.controller.commit(stepped=stepped, has_advantage=with_advantage > 0)
        if usable:
            self._feedback = (entropy_sum, tokens)
        self._begun = False

    def scale(self, advantages: Tensor, logprobs: Tensor, success: Tensor | None = None) -> Tensor:
        """Scale advantages so that a loss that is linear in them does what the controller asks for.

            A'  =  k f A + alpha |A| 1[pi > tau]        k, f and `rescaled` A from `Steering`; A' has A's sign, or is 0

        A clipped loss of A' is EntroPIC's form `ratio_clip: ppo`: where the clip holds a token, the term has no
        gradient either. |alpha| is bounded by 1.

        Args:
            advantages: advantages, of the shape of `logprobs` or one that broadcasts to it.
            logprobs: log-probs of the policy that decides which tokens have pi > tau; read as constants.
            success: shares of right responses of the tokens' prompts, of a shape that broadcasts likewise; needed where
                `Steering.reads_success`.

        Returns:
            A', in the shape of `logprobs`.
        """
        steering = self.steering
        flat = advantages.expand_as(logprobs).reshape(-1)
        chosen = logprobs.detach().reshape(-1)
        shares = None if success is None else success.expand_as(logprobs).reshape(-1)
        policy = steering.rescaled(chosen, flat) if steering.logprob_scale else flat
        if steering.focus is not None:
            assert shares is not None
            policy = policy * steering.focus.at(shares, flat)
        policy = policy * steering.kept(chosen, flat)
        if not steering.has_term:
            return policy.view_as(logprobs)
        tau = self.config.tau if steering.tau is None else steering.tau
        # At ratio 1 the term is -|A| on the tokens it acts on.
        term, _ = entropic_term(chosen, torch.ones_like(chosen), flat, tau=tau, clip_low=0.5, clip_high=0.5)
        if steering.prompt_alpha is None:
            return (policy - min(max(steering.alpha, -1.0), 1.0) * term).view_as(logprobs)
        assert shares is not None
        return (policy - steering.alphas(shares).clamp(-1.0, 1.0) * term).view_as(logprobs)

    def state_dict(self) -> dict[str, Any]:
        """Controller and feedback as JSON types; floats survive JSON exactly."""
        return {
            "kind": self.controller.kind,
            "controller": self.controller.state_dict(),
            "feedback": None if self._feedback is None else list(self._feedback),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; the next steerings are those of a run that was not interrupted. Another kind starts fresh.

        Raises:
            ValueError: the state is none.
        """
        if state["kind"] != self.controller.kind:
            _logger.warning("the saved controller is of kind %s: this one starts fresh", state["kind"])
            return
        self.controller.load_state_dict(state["controller"])
        feedback = state["feedback"]
        self._feedback = None if feedback is None else (float(feedback[0]), float(feedback[1]))

    def save(self, folder: Path) -> None:
        """Write the state beside a checkpoint, whole or not at all."""
        write_text(folder / STATE_FILE, json.dumps(self.state_dict()) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; a checkpoint without it, as of a run without control, starts the controller fresh.

        Raises:
            UserError: the file cannot be read, or holds something else.
        """
        path = folder / STATE_FILE
        if not path.exists():
            _logger.warning("%s is not there: the entropy controller starts fresh", path)
            return
        with reading(path):
            text = path.read_text(encoding="utf-8")
        try:
            self.load_state_dict(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no state of this entropy controller: {error}") from error


def window_sums(entropies: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """Sum what a controller reads of some tokens: entropies in nats, tokens, tokens with A != 0; [3] float64.

    Args:
        entropies: entropies of softmax(logits / temperature), of any shape.
        mask: of the same shape, non-zero where a token counts.
        advantages: advantages before `HostedControl.scale`, of a shape that broadcasts to it.
    """
    counts = mask.detach().bool()
    nonzero = counts & (advantages.detach() != 0)
    total = entropies.detach().double().masked_fill(~counts, 0.0).sum()
    return torch.stack([total, counts.sum().double(), nonzero.sum().double()])


def read_settings(
    settings: Mapping[str, Any], *, host: str, lacks: Mapping[str, str], ratio_clip: str
) -> EntropyControlConfig:
    """Check settings of a controller in another trainer; `HostedControl` documents the arguments.

    Raises:
        UserError: see there.
    """
    # Imported here: this is the only thing in a plug-in that needs more than torch.
    from pydantic import ValidationError

    from megatron_entropic.config.algorithm import EntropyControlConfig
    from megatron_entropic.config.entropy_checks import section_violations

    problems = Problems()
    headline = f"entropy control in {host}:"
    try:
        config = EntropyControlConfig(**settings)
    except ValidationError as error:
        for one in error.errors():
            key = ".".join(str(part) for part in one["loc"])
            problems.add(f"{key}: {one['msg']}")
        problems.raise_if_any(headline)
        raise
    if not config.enabled:
        problems.add(f"controller: off. Without control use {host}'s own trainer")
    if config.feedback not in ("auto", "score_pass", "previous_step"):
        problems.add(f"feedback: {config.feedback} exists in our own trainer only; choose score_pass or previous_step")
    if config.reanchor == "measured":
        problems.add(f"reanchor: {host} does not score responses again after a step; choose detected")
    if config.weight_limit is not None:
        problems.add("weight_limit: with denominator all_tokens weights are within 1 +- alpha; leave it out")
    if config.denominator != "all_tokens":
        problems.add(f"denominator: {host} has one for all tokens; choose all_tokens")
    if config.measure != "tokens":
        problems.add(f"measure: {config.measure} exists in our own trainer only; choose tokens")
    if "ratio_clip" in config.model_fields_set and config.ratio_clip != ratio_clip:
        problems.add(f"ratio_clip: in this loss of {host} the term is as {ratio_clip} has it; choose that")
    for name in controller_entry(config.controller).asks:
        if name in lacks:
            problems.add(f"controller: {config.controller} asks for {name}: {lacks[name]}")
    # What depends on the feedback is said above.
    for violation in section_violations(config, "score_pass"):
        problems.add(violation.message)
    problems.raise_if_any(headline)
    return config


def missing_host(name: str, install: str) -> UserError:
    """The error for a plug-in whose host is not installed."""
    return UserError(f"megatron_entropic.plugins.{name} works inside {name}, which is not installed: {install}")
