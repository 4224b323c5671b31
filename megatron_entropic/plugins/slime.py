"""Entropy control in slime, by the names of two functions; the vocabulary stays sharded, and no copy of logits is made.

    --loss-type custom_loss --custom-loss-function-path megatron_entropic.plugins.slime.policy_loss
    --custom-megatron-before-train-step-hook-path megatron_entropic.plugins.slime.before_train_step
    --custom-config-path control.yaml               with a section entropy_control

    before_train_step   the last step's window, summed over ranks --end, begin--> steering
    policy_loss         our operation on [1, T, V/tp], H into the window, advantages scaled for slime's own loss
    save_checkpoint     end, and the state beside Megatron's checkpoint, which the first step of a later process reads

A run's first step is not steered: slime measures while it updates.
"""

from __future__ import annotations

import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.errors import UserError
from megatron_entropic.plugins.control import HostedControl, missing_host, window_sums
from megatron_entropic.tensor_parallel import logprob_and_entropy

try:
    from slime.backends.megatron_utils import loss as slime_loss
except ModuleNotFoundError as error:
    raise missing_host("slime", "put its checkout on the PYTHONPATH, with Megatron") from error


class SlimeControl:
    """The controller of one process of a run, with the sums of the step at hand."""

    def __init__(self, args: Namespace) -> None:
        settings = getattr(args, "entropy_control", None)
        if settings is None:
            raise UserError(
                "entropy control in slime: --custom-config-path needs a file with a section entropy_control"
            )
        by_success = ("prompt_alpha", "focus", "bonus_threshold")
        lacks = dict.fromkeys(by_success, "slime's loss is not told how often a prompt was solved")
        self.control = HostedControl({"feedback": "previous_step", **settings}, host="slime", lacks=lacks)
        if self.control.config.feedback == "score_pass":
            raise UserError("entropy control in slime: feedback: slime measures while it updates; choose previous_step")
        self._window: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add the sums of a micro-batch."""
        self._window = sums if self._window is None else self._window + sums

    def end(self) -> None:
        """End the step at hand, all ranks together.

        Tensor-parallel ranks hold the same tokens, so sums count them once each; the mean is the same. A skipped step
        counts as one taken: slime tells no hook.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        window = torch.zeros(3, dtype=torch.float64, device=device)
        if self._window is not None:
            window += self._window
        self._window = None
        dist.all_reduce(window)
        if window[1] > 0:
            self.control.end(window.tolist(), stepped=True)


# slime knows a plug-in by the names of its functions and hands them no object. Its `args` go into every checkpoint as a
# pickle, so what the two functions share between their calls is not there but here, and belongs to this process.
_of_process: list[SlimeControl] = []


def before_train_step(
    args: Namespace, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> None:
    """slime's hook before each optimizer step: end the last one, and fix what this one does."""
    if not _of_process:
        _of_process.append(_start(args, rollout_id))
    mine = _of_process[0]
    mine.end()
    if mine.control.has_measurement:
        mine.control.begin()


def policy_loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's own policy loss, from our log-probs and entropies and from scaled advantages.

    Args:
        args: slime's.
        batch: a micro-batch.
        logits: [1, T, V/tp] float32; the backward pass writes their gradient in their place.
        sum_of_sample_mean: slime's reduction.

    Returns:
        (loss, metrics) of slime, and the metrics of entropy control.
    """
    if not _of_process:
        raise UserError(
            "entropy control in slime: --custom-megatron-before-train-step-hook-path must name "
            "megatron_entropic.plugins.slime.before_train_step"
        )
    mine = _of_process[0]
    control, steering = mine.control, mine.control.steering
    args = copy.copy(args)
    args.entropy_coef = getattr(args, "entropy_coef", 0.0) + steering.entropy_coefficient
    if steering.clip_high is not None:
        args.eps_clip_high = steering.clip_high
    outputs = log_probs_and_entropy(args, batch, logits)
    advantages = torch.cat(batch["advantages"])
    logprobs, entropies = torch.cat(outputs["log_probs"]), torch.cat(outputs["entropy"])
    mine.add(window_sums(entropies, torch.cat(batch["loss_masks"]), advantages))
    scaled = control.scale(advantages, logprobs).split([part.numel() for part in batch["advantages"]])
    with _given(outputs):
        loss, metrics = slime_loss.policy_loss_function(
            args, {**batch, "advantages": list(scaled)}, logits, sum_of_sample_mean
        )
    # slime adds metrics up and divides by the number of samples, or of tokens: what its reduction makes of 1.
    share = sum_of_sample_mean(torch.ones_like(logprobs)).detach()
    return loss, metrics | {name: share * value for name, value in control.controller.metrics().items()}


def log_probs_and_entropy(args: Namespace, batch: dict[str, Any], logits: Tensor) -> dict[str, list[Tensor]]:
    """Log-probs and entropies of each sample's response, what slime's `get_log_probs_and_entropy` returns.

    Raises:
        UserError: top-p replay, whose log-probs are of another distribution than the entropy.
    """
    if slime_loss.get_rollout_top_p_logprob_kwargs(args, batch):
        raise UserError("entropy control in slime: replay of the rollout's top-p is not supported; switch it off")
    tokens, lengths, responses = (batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths"))
    rows = logits.squeeze(0)
    target = slime_loss._build_shifted_tokens(len(rows), rows.device, tokens, lengths, responses, args.allgather_cp)
    logprobs, entropies = logprob_and_entropy(
        rows,
        target,
        group=slime_loss.mpu.get_tensor_model_parallel_group(),
        temperature=getattr(args, "rollout_temperature", 1.0),
        entropy_gradient=args.entropy_coef != 0.0,
    )
    parts = slime_loss._extract_per_sample(logprobs, entropies, lengths, responses, args.allgather_cp)
    outputs = dict(zip(("log_probs", "entropy"), parts, strict=True))
    if args.allgather_cp:
        slime_loss._allgather_cp_redistribute(
            outputs, logits_local_len=len(rows), total_lengths=lengths, response_lengths=responses
        )
    return outputs


@contextmanager
def _given(outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Have slime's loss find these log-probs and entropies where it would compute its own."""
    own = slime_loss.get_log_probs_and_entropy
    slime_loss.get_log_probs_and_entropy = lambda logits, **options: (logits.new_empty(0), outputs)
    try:
        yield
    finally:
        slime_loss.get_log_probs_and_entropy = own


def _start(args: Namespace, rollout_id: int) -> SlimeControl:
    """Make the controller of a process, as the checkpoint left it, and have every later checkpoint keep it."""
    from slime.backends.megatron_utils import model as slime_model

    mine = SlimeControl(args)
    # A run that goes on does so with the rollout after the one that its checkpoint is named for.
    if rollout_id > 0 and getattr(args, "load", None):
        mine.control.load(checkpoint_folder(args.load, rollout_id - 1))
    slime_model.save_checkpoint = keep_state(slime_model.save_checkpoint, mine, args)
    return mine


def keep_state(save: Callable[..., Any], mine: SlimeControl, args: Namespace) -> Callable[..., Any]:
    """Wrap slime's `save_checkpoint`, which all ranks call, so that the controller's state is kept with it."""

    @functools.wraps(save)
    def kept(iteration: int, *others: Any, **options: Any) -> Any:
        result = save(iteration, *others, **options)
        mine.end()
        if dist.get_rank() == 0:
            mine.control.save(checkpoint_folder(args.save, iteration))
        return result

    return kept


def checkpoint_folder(root: str, iteration: int) -> Path:
    """Folder of one of Megatron's checkpoints."""
    return Path(root) / f"iter_{iteration:07d}"
