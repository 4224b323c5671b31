"""Within a pass the host never waits for a GPU: tensors without values refuse whatever would have to.

What needs a value on the host (`float(tensor)`, a mask as an index, `repeat_interleave` without a size) raises on the
meta device; copies to a fake GPU are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from test_microbatch_loss import LENGTHS, PUSHED, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from megatron_entropic.config.algorithm import Aggregation
from megatron_entropic.policy.batch.host_copies import parked_on_host, to_device
from megatron_entropic.policy.batch.microbatch import PackingRules, pack_one
from megatron_entropic.policy.step.loss import MicrobatchLoss, Normalizers
from megatron_entropic.policy.step.loss_fields import TokenFields
from megatron_entropic.types import Sequence

CUDA = torch.device("cuda", 0)
META = torch.device("meta")


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """Every new tensor is fake, on a GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class Copies(TorchFunctionMode):
    """Counts copies between devices, those that the host waits for apart. Pinning needs a driver: it does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.queued = self.waited_for = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.empty_like:
            kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.copy_):
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            if source.device != result.device:
                self.queued += bool(kwargs.get("non_blocking"))
                self.waited_for += not kwargs.get("non_blocking")
        return result


def column() -> torch.Tensor:
    """A number for each response token of a micro-batch."""
    return torch.empty(sum(LENGTHS), device=META)


@pytest.mark.parametrize("mode", get_args(Aggregation))
@pytest.mark.parametrize("high_prob", [False, True])
@pytest.mark.parametrize("policy_loss", ["clipped", "gspo"])
def test_a_loss_is_computed_without_looking_at_it(mode: Aggregation, high_prob: bool, policy_loss: str) -> None:
    chosen = settings(high_prob, aggregation=mode, policy_loss=policy_loss)
    lengths = torch.empty(len(LENGTHS), dtype=torch.int64, device=META)
    fields = TokenFields(lengths, column(), column(), correction=column(), reference_logprobs=column())
    counts = Normalizers(tokens=sum(LENGTHS), sequences=len(LENGTHS), high_prob_tokens=7.0)
    loss, sums = MicrobatchLoss(fields, chosen, counts, PUSHED).share(column(), column())
    assert (loss.device, sums.device) == (META, META)


@pytest.mark.usefixtures("fake_gpu")
def test_a_micro_batch_goes_to_the_gpu_in_its_queue_and_without_what_nobody_reads_there() -> None:
    with torch._C._DisableTorchDispatch():  # packed of real tensors, as in a run
        sequences = [Sequence(tokens=torch.arange(n + 2), prompt_length=2) for n in LENGTHS]
        micro_batch = pack_one(sequences, list(range(len(LENGTHS))), PackingRules())
    with Copies() as copies:
        moved = micro_batch.to(CUDA)
    assert moved.tokens.device == CUDA
    assert copies.waited_for == 0
    assert copies.queued == 5, "tokens, positions, borders, rows and targets"


@pytest.mark.usefixtures("fake_gpu")
def test_what_a_score_pass_keeps_for_later_is_parked_on_the_host_without_waiting() -> None:
    with Copies() as copies:
        parked = parked_on_host(torch.empty(3, 2, dtype=torch.uint8, device=CUDA))
        assert parked.device.type == "cpu"
        assert to_device(parked, CUDA).device == CUDA
    assert (copies.queued, copies.waited_for) == (2, 0)
