"""The router of a layer with experts: megatron-core's, which also counts where tokens go.

Router logits and probabilities are float32 whatever the dtype of the model (`moe_router_dtype`). What an update has
routed is counted where autograd is on, so each token once, also when layers are recomputed; padding is counted too.

The auxiliary loss of a micro-batch is the one of Switch Transformer (Fedus et al. 2021, equation 4) over its tokens. An
optimizer step minimises policy.moe_aux_loss_coefficient times its mean over micro-batches and replicas, weighted by
their tokens; megatron-core's own weights assume that gradients are divided by a token count at the end, and here they
are not.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_entropic.policy.batch.host_copies import parked_on_host
from megatron_entropic.policy.model.router_replay import ReplayedChoice, storage_dtype


class PolicyRouter(TopKRouter):
    """Top-k router of one layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _provide_missing_name()
        super().__init__(*arguments, **options)
        self._token_weight = 0.0
        self._counts: torch.Tensor | None = None
        self._aux_loss: torch.Tensor | None = None
        self._differing: torch.Tensor | None = None
        self.choice = ReplayedChoice()
        self.recorded: list[torch.Tensor] | None = None
        """List to which each pass over a micro-batch adds its experts, [t, k], parked on the host; None keeps none."""

    @property
    def place(self) -> int:
        """Number of this layer among the model's layers with experts, from 0."""
        return sum(self.config.moe_layer_freq[: self.layer_number - 1])

    def enable_replay(self) -> None:
        """Let `choice` choose the experts."""
        self.router_replay = self.choice

    def begin_step(self, step_tokens: int) -> None:
        """Forget what was counted; `step_tokens` are those of all micro-batches and replicas of the coming step."""
        self._token_weight = 1.0 / step_tokens
        self._counts = self._aux_loss = self._differing = None

    def counted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts since `begin_step`, on this rank: tokens sent to each expert [experts] and auxiliary loss [], float64.

        Sums over ranks with different tokens are those of the step.
        """
        nothing = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=self.weight.device)
        counts = nothing[1:] if self._counts is None else self._counts.double()
        return counts, nothing[0] if self._aux_loss is None else self._aux_loss.double()

    def replayed(self) -> torch.Tensor:
        """Replayed choices that the router would not have made, and all, since `begin_step` on this rank; [2] int64."""
        return self.weight.new_zeros(2, dtype=torch.int64) if self._differing is None else self._differing

    def routing(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens as megatron-core does and count them; returns probabilities and map [tokens, experts]."""
        probs, routing_map = super().routing(*arguments, **options)
        if self.training and torch.is_grad_enabled():
            self._counts = _added(self._counts, routing_map.sum(dim=0))
            if self.choice.differing is not None:
                self._differing = _added(self._differing, self.choice.differing)
        # Layers to be recomputed run without gradients first.
        if self.recorded is not None and (torch.is_grad_enabled() or not self.training):
            self.recorded.append(parked_on_host(self.choice.chosen.to(storage_dtype(self.num_experts))))
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        _name: str,
        reduce_group: torch.distributed.ProcessGroup,
        **_options: Any,
    ) -> torch.Tensor:
        """Let backward add this rank's part of the micro-batch's auxiliary loss, weighted as said above.

        Parts of the ranks of `reduce_group`, which share a micro-batch, add up to its loss.
        """
        weight = activation.shape[0] * reduce_group.size() * self._token_weight
        part = aux_loss.detach() * (weight / aux_loss_coeff)
        self._aux_loss = _added(self._aux_loss, part)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * weight)
        return attached


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total + part


def _provide_missing_name() -> None:
    """Give megatron-core 0.16 a name that it looks for."""
    # It asks whether `te_general_gemm` is None; without Transformer Engine there is no such name.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
