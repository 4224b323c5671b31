"""Names that a configuration can choose: one table for each choice, read by the checks and by the code it names.

A row says where the code is (`module:attribute`, imported when it is wanted) and what must be known of it before:
the checks and the plan of a run import no tensor library.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from megatron_entropic.config.plugins import is_module_name

_LOSSES = "megatron_entropic.algorithms.losses"
_ANSWERS = "megatron_entropic.rewards.answers"
_VERIFIERS = "megatron_entropic.rewards.verifiers"
_CONTROLLERS = "megatron_entropic.algorithms.entropy_control"


@dataclass(frozen=True, slots=True)
class LossEntry:
    """Where the code of a value of algorithm.policy_loss is, and which tokens it looks at."""

    target: str
    plan: str | None = None
    """Function that ranks tokens over the whole optimizer step before it begins; None: the loss needs no such plan."""
    whole_sequences: bool = False
    """Whether the loss of a token depends on the other tokens of its sequence."""


POLICY_LOSSES = {
    "clipped": LossEntry(f"{_LOSSES}.token:clipped"),
    "reinforce": LossEntry(f"{_LOSSES}.token:reinforce"),
    "gspo": LossEntry(f"{_LOSSES}.token:gspo", whole_sequences=True),
    "cispo": LossEntry(f"{_LOSSES}.token:cispo"),
    "ce_gppo": LossEntry(f"{_LOSSES}.token:ce_gppo"),
    "steer": LossEntry(f"{_LOSSES}.batch:steer", plan=f"{_LOSSES}.batch:steer_plan"),
    "clip_cov": LossEntry(f"{_LOSSES}.batch:clip_cov", plan=f"{_LOSSES}.batch:clip_cov_plan"),
    "kl_cov": LossEntry(f"{_LOSSES}.batch:kl_cov", plan=f"{_LOSSES}.batch:kl_cov_plan"),
}


@dataclass(frozen=True, slots=True)
class ControllerEntry:
    """Where the code of a value of entropy_control.controller is, and what it acts on."""

    target: str
    """Subclass of `Controller`."""
    steers_alpha: bool = True
    """Whether the loss may have EntroPIC's term."""
    answers_error: bool = False
    """Whether alpha is EntroPIC's function of the error: gains matter, and the published code has it."""
    reads_target: bool = True
    """Whether entropy_control.target does more than stand in the log."""
    asks: tuple[str, ...] = ()
    """Fields of `Steering` that the controller sets beside alpha and tau, for trainers that cannot do all of them."""


CONTROLLERS = {
    "p": ControllerEntry(f"{_CONTROLLERS}.proportional_integral:EntropyController", answers_error=True),
    "pi": ControllerEntry(f"{_CONTROLLERS}.proportional_integral:EntropyController", answers_error=True),
    "constant": ControllerEntry(f"{_CONTROLLERS}.baselines:ConstantAlpha", reads_target=False),
    "unsolved": ControllerEntry(f"{_CONTROLLERS}.sources:Unsolved", reads_target=False, asks=("prompt_alpha",)),
    "cascade": ControllerEntry(f"{_CONTROLLERS}.sources:Cascade"),
    "probe": ControllerEntry(f"{_CONTROLLERS}.baselines:Probe", reads_target=False),
    "entropy_bonus": ControllerEntry(
        f"{_CONTROLLERS}.baselines:EntropyBonus", steers_alpha=False, reads_target=False, asks=("entropy_coefficient",)
    ),
    "aec": ControllerEntry(
        f"{_CONTROLLERS}.baselines:AdaptiveEntropyCoefficient", steers_alpha=False, asks=("entropy_coefficient",)
    ),
    "entrocraft": ControllerEntry(
        f"{_CONTROLLERS}.baselines:Entrocraft", reads_target=False, steers_alpha=False, asks=("samples",)
    ),
    "dmmpt": ControllerEntry(f"{_CONTROLLERS}.baselines:Dmmpt", steers_alpha=False, asks=("drop_positive_above",)),
    "repo_r": ControllerEntry(f"{_CONTROLLERS}.adaptive:RepoR", steers_alpha=False, asks=("logprob_scale",)),
    "adapo": ControllerEntry(f"{_CONTROLLERS}.adaptive:Adapo", steers_alpha=False, asks=("clip_high",)),
    "aer": ControllerEntry(
        f"{_CONTROLLERS}.adaptive:Aer", steers_alpha=False, asks=("entropy_coefficient", "bonus_threshold")
    ),
    "fade": ControllerEntry(f"{_CONTROLLERS}.adaptive:Fade", reads_target=False, steers_alpha=False, asks=("focus",)),
}
OFF = "off"
"""The value of entropy_control.controller that leaves the loss as it is, and of its guard."""


@dataclass(frozen=True, slots=True)
class GuardEntry:
    """Where the class of a value of entropy_control.guard is, and its numbers where the configuration has none."""

    target: str
    top: float
    bottom: float
    gain: float
    integral_gain: float


GUARDS = {
    "ceiling": GuardEntry(f"{_CONTROLLERS}.guards:Ceiling", top=1.12, bottom=0.0, gain=10.0, integral_gain=0.5),
    "band": GuardEntry(f"{_CONTROLLERS}.guards:Band", top=1.2, bottom=0.4, gain=8.0, integral_gain=0.0),
}


@dataclass(frozen=True, slots=True)
class AnswerEntry:
    """Where the code of a value of reward.answer is, a way to find the answer in a response."""

    target: str
    """Function: response -> the answer as written, None without one."""
    alone: str | None = None
    """Function: answer -> a response in which nothing else is found. None for a pattern of somebody's own.

    Where it is known, finding an answer takes time linear in the response.
    """
    takes_pattern: bool = False
    """Whether the target's first argument is reward.answer_pattern."""


ANSWERS = {
    "boxed": AnswerEntry(f"{_ANSWERS}:last_boxed", alone=f"{_ANSWERS}:in_box"),
    "last_number": AnswerEntry(f"{_ANSWERS}:last_number", alone=f"{_ANSWERS}:as_it_is"),
    "first_line": AnswerEntry(f"{_ANSWERS}:first_line", alone=f"{_ANSWERS}:as_it_is"),
    "whole_response": AnswerEntry(f"{_ANSWERS}:whole_response", alone=f"{_ANSWERS}:as_it_is"),
    "regex": AnswerEntry(f"{_ANSWERS}:by_pattern", takes_pattern=True),
}


@dataclass(frozen=True, slots=True)
class VerifierEntry:
    """Where the code of a value of reward.verifier is; targets are functions of rewards/verifiers/."""

    target: str
    answer: str | None = None
    """How the verifier finds the answer where reward.answer does not say; None: it looks at responses as they are.

    With it the target gets the answer, or None where there is none, instead of the response.
    """
    vote: str | None = None
    """Function: answer -> its writing in votes, None if it has no say. None where the verifier knows no answer."""
    trials: str | None = None
    """Function: ground truth -> answers to try it with before training. None where any ground truth will do."""
    once: bool = False
    """Whether equal answers to one prompt are judged once."""
    instant: bool = False
    """Whether the verifier's time is bounded and far below that of asking another process."""
    takes_pattern: bool = False
    """Whether the target's first argument is reward.format_pattern."""
    takes_settings: bool = False
    """Whether the target is a function of the section `reward` that returns the verifier."""
    reads_prompt: bool = False
    """Whether the verifier finds the text of the prompt in extra_info, as PROMPT."""
    probe: str | None = None
    """Function of the section `reward` that asks once whether the verifier can be used; None: it always can."""


PROMPT = "prompt_text"
"""Key of extra_info under which a verifier with `reads_prompt` finds the prompt."""

VERIFIERS = {
    "countdown": VerifierEntry(
        f"{_VERIFIERS}.countdown:countdown",
        answer="whole_response",
        vote=f"{_VERIFIERS}.text:vote",
        trials=f"{_VERIFIERS}.text:any_verdict",
        instant=True,
    ),
    "exact": VerifierEntry(
        f"{_VERIFIERS}.text:exact", answer="whole_response", vote=f"{_VERIFIERS}.text:vote", instant=True
    ),
    "format": VerifierEntry(f"{_VERIFIERS}.text:response_format", takes_pattern=True),
    "ifeval": VerifierEntry(f"{_VERIFIERS}.ifeval:ifeval", trials=f"{_VERIFIERS}.text:any_verdict"),
    "judge": VerifierEntry(
        f"{_VERIFIERS}.judge:build",
        takes_settings=True,
        reads_prompt=True,
        probe=f"{_VERIFIERS}.judge:probe",
    ),
    "math": VerifierEntry(
        f"{_VERIFIERS}.math:math_verdict",
        answer="boxed",
        vote=f"{_VERIFIERS}.math_reading:math_vote",
        trials=f"{_VERIFIERS}.math_reading:math_trials",
        once=True,
    ),
}


ENVIRONMENTS = {
    "calculator": "megatron_entropic.environments.calculator:Calculator",
    "guess": "megatron_entropic.environments.guess:Guess",
    "verifiers": "megatron_entropic.environments.adapters.verifiers:Verifiers",
    "openenv": "megatron_entropic.environments.adapters.openenv:OpenEnv",
    "trl_tools": "megatron_entropic.environments.adapters.trl:TrlTools",
}
"""Classes by value of environment.name; see `environments.base.Environment`."""


@dataclass(frozen=True, slots=True)
class TransportEntry:
    """Code of a value of cluster.transport, which carries weights from policy to engines, and its conditions."""

    sender: str
    """Class of a policy rank's end, a `WeightSender`; see `weight_sync.gloo.GlooSender`."""
    receiver: str
    """Class of an engine's end, an `UpdateCalls`; see `rollout.gloo_transport.GlooUpdates`."""
    needs_gpu: bool = False
    colocated: bool | None = None
    """Whether the transport needs (True) or refuses (False) cluster.colocate; None: it goes with either."""
    why_colocated: str = ""
    """Words for the reason of `colocated`, for the message."""
    delta: bool = False
    """Whether the transport carries rollout.publish=delta."""


_SYNC, _ROLLOUT = "megatron_entropic.weight_sync", "megatron_entropic.rollout"
TRANSPORTS = {
    "nccl": TransportEntry(
        f"{_ROLLOUT}.nccl_transport:NcclSender",
        f"{_ROLLOUT}.nccl_transport:NcclUpdates",
        needs_gpu=True,
        colocated=False,
        why_colocated="refuses two processes on one GPU, as cluster.colocate=true has them",
    ),
    "ipc": TransportEntry(
        f"{_ROLLOUT}.ipc_transport:IpcSender",
        f"{_ROLLOUT}.ipc_transport:IpcUpdates",
        needs_gpu=True,
        colocated=True,
        why_colocated="hands memory over within one GPU, which needs cluster.colocate=true",
    ),
    "gloo": TransportEntry(f"{_SYNC}.gloo:GlooSender", f"{_ROLLOUT}.gloo_transport:GlooUpdates", delta=True),
}
"""Transports by name, the best first: cluster.transport=auto takes the first that goes."""

ADVANTAGES = ("grpo", "grpo_no_std", "rloo", "reinforce_plus_plus_baseline", "nsr", "w_reinforce", "wapo")


def verifier_entry(name: str) -> VerifierEntry:
    """The row of a verifier; of one of somebody's own (`module:function`) nothing is known."""
    return VERIFIERS.get(name, VerifierEntry(name))


def environment_target(name: str) -> str:
    """The class (`module:Class`) of a value of environment.name."""
    return ENVIRONMENTS.get(name, name)


def is_instant(verifier: str, answer: str | None) -> bool:
    """Whether a verifier and its way to find an answer (reward.answer) take bounded time, far below that of a call.

    A pattern of somebody's own can take any time.
    """
    way = ANSWERS.get(answer or "")
    return verifier_entry(verifier).instant and (way is None or not way.takes_pattern)


def controller_entry(name: str) -> ControllerEntry:
    """The row of a controller; of one of somebody's own (`module:Class`) nothing is known but that it may steer."""
    return CONTROLLERS.get(name, ControllerEntry(name, steers_alpha=name != OFF))


def transports_for(device: str, *, colocate: bool) -> list[str]:
    """Names of the transports that go on a device, the best first."""
    return [
        name
        for name, entry in TRANSPORTS.items()
        if (device == "cuda" or not entry.needs_gpu) and entry.colocated in (None, colocate)
    ]


def unknown_name(name: str, table: Collection[str], *, own: str | None = None) -> str | None:
    """Words for why a name cannot be chosen; None if it can.

    Args:
        table: the names that there are.
        own: form of a name of one's own code, such as `module:function`; None where it cannot be.
    """
    if name in table or (own is not None and is_module_name(name)):
        return None
    choices = ", ".join(table) + (f", or {own}" if own else "")
    nearest = difflib.get_close_matches(name, table, n=1)
    return f"expected one of {choices}" + (f"; did you mean {nearest[0]}?" if nearest else "")
