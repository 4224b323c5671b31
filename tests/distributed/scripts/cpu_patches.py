"""Asks every CPU patch whether it is needed, before and after applying them, and compares both RoPE functions."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from megatron_entropic.policy.megatron.cpu_patches import apply_cpu_patches, patches_for
from megatron_entropic.policy.megatron.platform import (
    check_megatron_version,
    installed_megatron_version,
    silence_known_noise,
)


def rotate() -> torch.Tensor:
    """megatron-core's RoPE of packed segments, the longest of which is not the whole batch."""
    from megatron.core.models.common.embeddings import rope_utils

    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([5, 17, 1, 30, 11, 30])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    tensor = torch.randn(int(cu_seqlens[-1]), 3, 22, generator=generator)
    angles = torch.outer(torch.arange(30.0), torch.rand(11, generator=generator))
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None, :]
    return rope_utils._apply_rotary_pos_emb_thd(tensor, cu_seqlens, freqs, cp_group=dist.group.WORLD)


def main() -> None:
    silence_known_noise()
    version = check_megatron_version(installed_megatron_version())
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", rank=0, world_size=1)
    patches = patches_for(version)
    before = {patch.target: patch.needed() for patch in patches}
    looped = rotate()
    compiled = torch.compiler.is_compiling, torch._dynamo.eval_frame._stance.stance
    apply_cpu_patches(version)
    apply_cpu_patches(version)
    result = {
        "before": before,
        "after": {patch.target: patch.needed() for patch in patches},
        "reasons": {patch.target: patch.reason for patch in patches},
        "stance": [compiled[1], torch._dynamo.eval_frame._stance.stance],
        "rope_difference": float((rotate() - looped).abs().max()),
        "rope_scale": float(looped.abs().max()),
        "rng_restored": rng_restored(),
        "unused": [name for name in ("torch._inductor.compile_fx", "wandb") if name in sys.modules],
    }
    sys.stdout.write(json.dumps(result))


def rng_restored() -> bool:
    """Whether megatron-core's tracker forks the generator and puts it back."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(6)
    plain = torch.rand(2)
    torch.manual_seed(6)
    first = torch.rand(1)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(1)
    second = torch.rand(1)
    return torch.equal(torch.cat([first, second]), plain) and not torch.equal(forked, second)


if __name__ == "__main__":
    main()
