"""RMSNorm for the layers where Transformer Engine is absent."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor, usable under sequence parallelism.

    megatron-core's own wrapper of torch norms refuses sequence parallelism. What it takes is the mark below: each
    tensor rank normalises its own tokens, so `finalize_model_grads` must sum the weight's gradient over them.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (torch types no such mark)
