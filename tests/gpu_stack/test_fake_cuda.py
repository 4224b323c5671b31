"""What only a GPU runs, with fake tensors on a fake GPU: shapes, dtypes and devices are right, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_entropic.tensor_parallel import fused_head, statistics

HIDDEN, ROWS, TOKENS, VOCABULARY, SHARD = 4096, 3000, 2000, 75000, 75968


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of hidden states and weights; everything within the test is fake."""
    with FakeTensorMode(), torch.no_grad():
        yield request.param


@pytest.mark.parametrize("chunks", [(None, None), (512, 8192)])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_fused_head_computes_statistics_and_gradients(
    dtype: torch.dtype, chunks: tuple[int | None, int | None], entropy_gradient: bool
) -> None:
    hidden = torch.empty(ROWS, HIDDEN, device="cuda", dtype=dtype)
    weight = torch.empty(SHARD, HIDDEN, device="cuda", dtype=dtype)
    main_grad = torch.empty(SHARD, HIDDEN, device="cuda")
    target, rows = (torch.empty(TOKENS, device="cuda", dtype=torch.int64) for _ in range(2))
    head = fused_head.build_head(
        hidden,
        weight,
        target,
        0.6,
        group=None,
        vocab_size=VOCABULARY,
        need_entropy=True,
        entropy_gradient=entropy_gradient,
        sequence_parallel=False,
        chunks=chunks,
        main_grad=main_grad,
        rows=rows,
        backend="eager",
    )
    inverse = torch.empty(TOKENS, device="cuda")
    chosen = head.select(hidden)
    columns = head.shard.columns(target)
    local = head.statistics(chosen, weight, columns, inverse)
    merged = statistics.gather_and_merge(local, target, inverse, head.shard, None, need_entropy=True)
    inputs = statistics.GradientInputs(columns, inverse, merged, inverse, inverse)
    gradient = head.gradients(chosen, weight, inputs, main_grad)
    for result in (chosen, local, gradient, head.reduce(gradient, hidden)):
        assert result.device.type == "cuda"
    assert chosen.shape == (TOKENS, HIDDEN)
    assert local.dtype == torch.float32
    assert gradient.dtype in (dtype, torch.float32)
    assert head.reduce(gradient, hidden).shape == hidden.shape
