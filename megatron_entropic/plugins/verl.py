"""Entropy control in verl: `import verl` loads this module by its entry point, and verl's configuration names it.

    trainer.v1.trainer_mode=entropic_sync +entropy_control.target=0.5 +entropy_control.kp=1.0
                          (or entropic_colocate_async, entropic_separate_async)

    _compute_old_log_prob   H of the batch, which that pass measures anyway --begin--> steering
    _compute_advantage      advantages scaled on the driver; workers run verl's own loss
    _update_actor           --end--> the controller advances
    _save_checkpoint        its state beside verl's own, read again by _load_checkpoint

`actor_rollout_ref.actor.policy_loss.loss_mode=entropic` is the published form instead: alpha travels to the workers,
and our loss adds the term with the ratio that no clip holds.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_entropic.algorithms import entropic_term, policy_loss
from megatron_entropic.errors import UserError
from megatron_entropic.plugins.control import HostedControl, missing_host, window_sums
from megatron_entropic.tensor_parallel import logprob_and_entropy

try:
    import transfer_queue
    from omegaconf import OmegaConf, open_dict
    from tensordict import TensorDict
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.trainer.ppo.v1 import (
        PPOTrainer,
        PPOTrainerColocateAsync,
        PPOTrainerSeparateAsync,
        PPOTrainerSync,
        register_trainer,
    )
    from verl.utils import tensordict_utils
    from verl.workers import engine_workers
    from verl.workers.utils.padding import response_to_nested
except ModuleNotFoundError as error:
    raise missing_host("verl", "pip install 'megatron_entropic[verl]'") from error

_ALPHA, _TAU = "entropic_alpha", "entropic_tau"
"""Names under which alpha and tau travel with a batch to the workers."""
_LOSS = "entropic"
HEAD_VARIABLE = "MEGATRON_ENTROPIC_VERL_HEAD"
"""Environment variable: 1 has verl's Megatron workers compute log-probs and entropies by `logprob_and_entropy`."""

# verl hands a registered loss neither the batch nor anything of the step. What carries alpha from the batch to the
# loss, in the one call in between, is a context variable: it has a value inside that call only.
_term: ContextVar[tuple[float, float] | None] = ContextVar("entropic_term", default=None)


@register_policy_loss(_LOSS)
def entropic_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """EntroPIC as published (arXiv 2511.15248): verl's clipped loss plus alpha times the term with the raw ratio.

    Arguments and result are those of every policy loss of verl; tensors are [B, R]. Alpha and tau come with the batch.

    Raises:
        UserError: the batch comes from a trainer without a controller.
    """
    carried = _term.get()
    if carried is None:
        raise UserError(
            f"policy_loss.loss_mode={_LOSS} gets alpha from a trainer with entropy control: set "
            "trainer.v1.trainer_mode=entropic_sync, entropic_colocate_async or entropic_separate_async"
        )
    alpha, tau = carried
    mask = response_mask.bool()
    low, high = (
        bound if bound is not None else config.clip_ratio for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    weights = None if rollout_is_weights is None else rollout_is_weights[mask]
    tokens = log_prob[mask], old_log_prob[mask], advantages[mask]
    clip: dict[str, Any] = {"clip_low": low, "clip_high": high, "dual_clip": config.get("clip_ratio_c", 3.0)}
    main = policy_loss(*tokens, importance_weights=weights, **clip)
    term, high_prob = entropic_term(tokens[0], main.ratio, tokens[2], tau=tau, importance_weights=weights, **clip)
    loss = torch.zeros_like(log_prob).masked_scatter(mask, main.loss + alpha * term)
    metrics = {
        "actor/pg_clipfrac": main.clipped.float().mean().item() if main.clipped.numel() else 0.0,
        "actor/entropic_high_prob": high_prob.float().mean().item() if high_prob.numel() else 0.0,
    }
    total = agg_loss(loss_mat=loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return total, metrics


def carry_term(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a worker's loss so that `entropic_policy_loss`, which it calls, finds the alpha of its batch."""

    @functools.wraps(loss)
    def carried(config: Any, model_output: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        alpha, tau = (tensordict_utils.get_non_tensor_data(data, key=key, default=None) for key in (_ALPHA, _TAU))
        token = _term.set(None if alpha is None else (float(alpha), float(tau)))
        try:
            return loss(config, model_output, data, *args, **kwargs)
        finally:
            _term.reset(token)

    return carried


class EntropicTrainer(PPOTrainer):
    """What a trainer of verl V1 gets in front of it; the class behind it says how sampling and training interleave.

    The scoring pass of one rollout steers all of its optimizer steps, and the controller counts them as one.
    """

    base_mode: str
    """Name of the trainer behind this one in verl's registry."""

    def __init__(self, config: Any) -> None:
        self.entropy_control = _build_control(config)
        # The classes behind look their own settings up by the name of the mode.
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode
        super().__init__(config)
        self._window: list[float] = []

    @property
    def _scales_advantages(self) -> bool:
        return bool(self.config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla") != _LOSS)

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_old_log_prob(batch, metrics)
        data = _fields(batch, "entropy", "response_mask").to_padded_tensor()
        # Advantages do not exist yet: `_compute_advantage` counts those that are not 0.
        self._window = window_sums(data["entropy"], data["response_mask"], torch.zeros(1)).tolist()
        self.entropy_control.begin(self._window)
        metrics.update(self.entropy_control.controller.metrics())
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        nested = _fields(batch, "advantages", "old_log_probs", "response_mask")
        data = nested.to_padded_tensor()
        advantages, mask = data["advantages"], data["response_mask"]
        self._window[2] = float(window_sums(torch.zeros_like(advantages), mask, advantages)[2])
        if self._scales_advantages:
            success = _success(batch) if self.entropy_control.steering.reads_success else None
            scaled = self.entropy_control.scale(advantages, data["old_log_probs"], success)
            fields = TensorDict(
                {"advantages": response_to_nested(scaled, nested["response_mask"])}, batch_size=len(batch)
            )
            batch = transfer_queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if not self._scales_advantages:
            steering = self.entropy_control.steering
            tau = self.entropy_control.config.tau if steering.tau is None else steering.tau
            batch.extra_info.update({_ALPHA: steering.alpha, _TAU: tau})
        batch = super()._update_actor(batch, metrics)
        # verl's workers skip a step whose gradient is not finite and say so by its norm only.
        norm = float(metrics.get("actor/grad_norm", 0.0))
        self.entropy_control.end(self._window, stepped=math.isfinite(norm))
        return batch

    def _save_checkpoint(self) -> None:
        # Before verl's own, which ends by declaring the checkpoint complete.
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        self.entropy_control.save(folder)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        trainer = self.config.trainer
        if self.global_steps == 0:
            return
        if trainer.resume_mode == "resume_path":
            self.entropy_control.load(Path(trainer.resume_from_path))
        else:
            self.entropy_control.load(Path(trainer.default_local_dir) / f"global_step_{self.global_steps}")


@register_trainer("entropic_sync")
class EntropicTrainerSync(EntropicTrainer, PPOTrainerSync):
    """verl's synchronous trainer with entropy control."""

    base_mode = "sync"


@register_trainer("entropic_colocate_async")
class EntropicTrainerColocateAsync(EntropicTrainer, PPOTrainerColocateAsync):
    """verl's trainer that shares its GPUs with the rollout, with entropy control."""

    base_mode = "colocate_async"


@register_trainer("entropic_separate_async")
class EntropicTrainerSeparateAsync(EntropicTrainer, PPOTrainerSeparateAsync):
    """verl's trainer beside a rollout on other GPUs, with entropy control."""

    base_mode = "separate_async"


def _build_control(config: Any) -> HostedControl:
    """The controller of verl's configuration.

    Raises:
        UserError: what it says cannot be done.
    """
    section = config.get("entropy_control")
    if section is None:
        raise UserError("entropy control in verl: there are no settings; add +entropy_control.target=NATS and others")
    correction = config.algorithm.get("rollout_correction", None)
    if correction and correction.get("bypass_mode", False):
        raise UserError(
            "entropy control in verl: algorithm.rollout_correction.bypass_mode leaves out the pass that measures the "
            "entropy; set it to false"
        )
    # The scoring pass comes before every update, so there is nothing to gain by the previous step's measurement.
    settings = {"feedback": "score_pass", **OmegaConf.to_container(section, resolve=True)}
    lacks = {
        "entropy_coefficient": "verl fixes the coefficient of the entropy for a run",
        "clip_high": "verl fixes its clip for a run",
    }
    published = config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla") == _LOSS
    if published:
        others = ("samples", "drop_positive_above", "prompt_alpha", "logprob_scale", "focus")
        lacks |= dict.fromkeys(others, f"policy_loss.loss_mode={_LOSS} gets alpha only; choose another loss")
    control = HostedControl(settings, host="verl", lacks=lacks, ratio_clip="none" if published else "ppo")
    if control.config.feedback == "previous_step":
        raise UserError("entropy control in verl: feedback: verl scores every batch anyway; choose score_pass")
    return control


def _success(batch: Any) -> Tensor:
    """Share of responses with a positive score among those to each row's prompt, [B, 1]."""
    data = _fields(batch, "uid", "rm_scores").to_padded_tensor()
    prompts = [str(uid) for uid in data.pop("uid").tolist()]
    right = (data["rm_scores"].sum(-1) > 0).tolist()
    found: dict[str, list[bool]] = {}
    for prompt, one in zip(prompts, right, strict=True):
        found.setdefault(prompt, []).append(one)
    shares = {prompt: sum(judged) / len(judged) for prompt, judged in found.items()}
    return torch.tensor([shares[prompt] for prompt in prompts]).unsqueeze(1)


def _fields(batch: Any, *names: str) -> Any:
    """Fields of a batch as verl keeps them, nested tensors of [B, R]."""
    return transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))


# Our operation in verl's Megatron workers.


def head_outputs(original: Callable[..., Any], group: Callable[[], Any]) -> Callable[..., Any]:
    """Stand in for `MegatronEngineWithLMHead._lm_head_logits_processor`: one pass instead of a copy and two.

    Args:
        original: verl's own, for what else it can compute.
        group: function that returns the tensor-parallel group.
    """

    @functools.wraps(original)
    def processed(engine: Any, logits: Tensor, label: Tensor, temperature: Tensor, **options: Any) -> dict[str, Tensor]:
        others = ("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only")
        if any(options[name] for name in others):
            result: dict[str, Tensor] = original(engine, logits, label, temperature, **options)
            return result
        logprobs, entropies = logprob_and_entropy(
            logits.flatten(0, 1),
            label.flatten(),
            group=group(),
            # verl gives padding a temperature of 0.
            temperature=temperature.expand_as(label).flatten().clamp(min=1e-8),
            need_entropy=options["calculate_entropy"],
            entropy_gradient=options["calculate_entropy"] and torch.is_grad_enabled(),
        )
        outputs = {"log_probs": logprobs.view_as(label)}
        if entropies is not None:
            outputs["entropy"] = entropies.view_as(label)
        return outputs

    return processed


def use_head() -> None:
    """Have verl's Megatron workers, in this process, compute log-probs and entropies by `logprob_and_entropy`."""
    from verl.workers.engine.megatron import transformer_impl

    engine = transformer_impl.MegatronEngineWithLMHead
    group = transformer_impl.mpu.get_tensor_model_parallel_group
    engine._lm_head_logits_processor = head_outputs(engine._lm_head_logits_processor, group)


engine_workers.ppo_loss = carry_term(engine_workers.ppo_loss)
if os.environ.get(HEAD_VARIABLE) == "1":
    use_head()
