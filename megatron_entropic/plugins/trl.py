"""Entropy control in TRL's GRPOTrainer: the same trainer, with one argument more.

    _compute_loss of the first micro-batch --begin--> steering      H of the last window, or of a scoring pass
    forward of each micro-batch: H into the window, advantages scaled before TRL's own loss reads them
    on_step_end --end--> the window, summed over processes, is the next measurement

TRL's loss, clipping, masks and denominators stay TRL's own, whatever its `loss_type`; see docs/plugins/trl.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_entropic.errors import UserError
from megatron_entropic.plugins.control import HostedControl, missing_host, window_sums
from megatron_entropic.tensor_parallel import fused_logprob_and_entropy

try:
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput
except ModuleNotFoundError as error:
    raise missing_host("trl", "pip install 'megatron_entropic[trl]'") from error

_SUCCESS = "entropic_success"
"""Key of TRL's batches for the share of completions with a positive reward of each row's prompt, [B, 1]."""
_FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Inputs of TRL's batches that its forward pass takes by name, beside tokens and masks."""


class EntropicGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose entropy is controlled; every argument of GRPOTrainer, and two more.

    Args:
        entropy_control: keys of our section `entropy_control`, such as {"target": 0.5, "kp": 1.0, "ki": 0.01}.
        head: "trl", or "megatron_entropic" for this package's fused output head, on a plain causal language model.

    Attributes:
        entropy_control: the controller and what it was fed.

    Raises:
        UserError: settings that do not go together, all in one message.
    """

    def __init__(
        self,
        *args: Any,
        entropy_control: Mapping[str, Any],
        head: Literal["trl", "megatron_entropic"] = "trl",
        **kwargs: Any,
    ) -> None:
        self.entropy_control = HostedControl(entropy_control, host="TRL")
        super().__init__(*args, **kwargs)
        _check_arguments(self.args)
        clip = self.args.epsilon_high
        self._own_clip: float = self.args.epsilon if clip is None else clip
        self._success: Tensor | None = None
        self._inputs: dict[str, Any] | None = None
        self._window: Tensor | None = None
        if head == "megatron_entropic":
            use_fused_head(self.model, self.temperature)
        self.add_callback(_EndOfStep(self))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's own, [all processes' B, functions]; the share of right completions of each prompt is kept."""
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        right = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1) > 0
        samples = self.num_generations if self.model.training else self.num_generations_eval
        self._success = right.float().view(-1, samples).mean(dim=1).repeat_interleave(samples)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._success is not None
        first = self.accelerator.process_index * len(inputs)
        outputs[_SUCCESS] = self._success[first : first + len(inputs)].unsqueeze(1)
        return outputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        if self._window is None:
            self._begin_window(model)
        # A copy: TRL uses the same inputs again in its next iteration, with advantages as they were.
        self._inputs = dict(inputs)
        try:
            return super()._compute_loss(model, self._inputs)
        finally:
            self._inputs = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own; within the loss it also measures, and scales what the loss is about to read."""
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        inputs = self._inputs
        if inputs is not None:
            logprobs, entropies = result[0], result[1]
            advantages = _per_token(inputs["advantages"])
            sums = window_sums(entropies, _mask(inputs), advantages)
            self._window = sums if self._window is None else self._window + sums
            inputs["advantages"] = self.entropy_control.scale(advantages, logprobs, inputs.get(_SUCCESS))
            steering = self.entropy_control.steering
            if steering.bonus_threshold is not None:
                # TRL's bonus has one coefficient. A factor on the gradient alone leaves what TRL logs as it is.
                constant = entropies.detach()
                factors = steering.bonus_factors(inputs[_SUCCESS])
                return (logprobs, constant + factors * (entropies - constant), *result[2:])
        return result

    def _begin_window(self, model: Any) -> None:
        """Fix the steering of an optimizer step, before its first micro-batch."""
        scored = self._everywhere(self._score_window(model)) if self.entropy_control.wants_score else None
        steering = self.entropy_control.begin(scored)
        # TRL's own entropy bonus, with our coefficient.
        self.entropy_coef = steering.entropy_coefficient
        self._entropy_bonus_enabled = steering.entropy_coefficient != 0.0
        self.epsilon_high = self._own_clip if steering.clip_high is None else steering.clip_high

    def _score_window(self, model: Any) -> Tensor:
        """Measure the coming optimizer step's micro-batches under the weights before it, as far as there are any yet.

        Where TRL samples more often than it steps (steps_per_generation < gradient_accumulation_steps), the rest of the
        window is not sampled yet.
        """
        steps = self.args.steps_per_generation
        first = self._step % steps
        total = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for inputs in self._buffered_inputs[first : first + self.current_gradient_accumulation_steps]:
            tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            extra = {key: inputs[key] for key in _FORWARD_KEYS if key in inputs}
            with torch.no_grad():
                _, entropies, _ = super()._get_per_token_logps_and_entropies(
                    model, tokens, attention, inputs["completion_ids"].size(1), compute_entropy=True, **extra
                )
            total += window_sums(entropies, _mask(inputs), _per_token(inputs["advantages"]))
        return total

    def end_window(self) -> None:
        """Tell the controller that its optimizer step was taken, or skipped for gradients that are not finite."""
        if self._window is None:
            return
        window, self._window = self._everywhere(self._window), None
        for name, value in self.entropy_control.controller.metrics().items():
            self._metrics["train"][name].append(value)
        self.entropy_control.end(window, stepped=not self.accelerator.optimizer_step_was_skipped)

    def _everywhere(self, sums: Tensor) -> list[float]:
        total: list[float] = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.entropy_control.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.entropy_control.load(Path(checkpoint))


class _EndOfStep(TrainerCallback):
    """Calls `end_window` after each optimizer step, before TRL logs or saves it."""

    def __init__(self, trainer: EntropicGRPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_window()


def _mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that TRL's loss counts, [B, T]."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _per_token(advantages: Tensor) -> Tensor:
    """Advantages that broadcast over [B, T]: TRL has one for each sequence, [B], its subclasses may have [B, T]."""
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def _check_arguments(args: Any) -> None:
    if args.entropy_coef or args.use_adaptive_entropy:
        raise UserError(
            "entropy control in TRL: entropy_coef and use_adaptive_entropy are another controller of the same entropy; "
            "leave them out (the controllers entropy_bonus and aec do the same)"
        )


def use_fused_head(model: Any, temperature: float) -> None:
    """Let `model(..., fused_lm_head=True)` compute log-probs and entropies by `fused_logprob_and_entropy`.

    It stands in for the head that TRL gave the model, which keeps every other call.

    Args:
        model: causal language model with TRL's head.
        temperature: temperature of the rollouts.

    Raises:
        UserError: the model does more than one product after its last layer, or has adapters.
    """
    text = model.config.get_text_config()
    layer = model.get_output_embeddings()
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    found = [name for name in scales if getattr(text, name, None) not in (None, 1.0)]
    found += ["a bias"] if layer.bias is not None else []
    found += ["adapters"] if hasattr(model, "peft_config") else []
    found += ["parts that are no text"] if text is not model.config else []
    if found:
        raise UserError(f"head='megatron_entropic' needs a plain causal language model, not {found}: use 'trl'")
    others = model.forward

    # `generate` checks its arguments against the signature of the model's own forward.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or "output_router_logits" in kwargs:
            if labels is not None:
                kwargs["labels"] = labels
            return others(*args, fused_lm_head=fused_lm_head, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        target = labels[:, 1:]
        scored = (target != -100).reshape(-1)
        logprobs, entropies = fused_logprob_and_entropy(
            hidden.reshape(-1, hidden.size(-1)),
            self.get_output_embeddings().weight,
            target.clamp(min=0).reshape(-1),
            temperature=temperature,
            entropy_gradient=True,
            loss_mask=scored,
        )
        assert entropies is not None
        return FusedCausalLMOutput(log_probs=logprobs.view_as(target), entropy=entropies.view_as(target))

    model.forward = MethodType(forward, model)
