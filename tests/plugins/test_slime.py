"""slime's own loss with our control, where SLIME_CHECKOUT names its checkout: it is no package of an index."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded import PROMPT_LENGTH, SETTINGS, Outcome, RecordedStep, assert_same, our_trainer, recorded_steps
from torch import Tensor

CHECKOUT = os.environ.get("SLIME_CHECKOUT")
if not CHECKOUT:
    pytest.skip("SLIME_CHECKOUT names no checkout of slime, which no index has", allow_module_level=True)
sys.path.insert(0, CHECKOUT)


@pytest.fixture(scope="module", autouse=True)
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's process groups of one rank."""
    from megatron.core import mpu

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mpu.initialize_model_parallel(1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in as a new process has it. slime's `model` needs Megatron-LM, of which only its save is looked at."""
    model = ModuleType("slime.backends.megatron_utils.model")
    model.save_checkpoint = lambda iteration, *others: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, model.__name__, model)
    import slime.backends.megatron_utils as package

    from megatron_entropic.plugins import slime as module

    monkeypatch.setattr(package, "model", model, raising=False)
    module._of_process.clear()
    return module


def arguments(loss_type: str, **others: Any) -> Namespace:
    values: dict[str, Any] = {
        "loss_type": loss_type,
        "custom_loss_function_path": "megatron_entropic.plugins.slime.policy_loss",
        "calculate_per_token_loss": True,
        "recompute_loss_function": False,
        "allgather_cp": False,
        "rollout_temperature": 1.0,
        "rollout_top_p": 1.0,
        "log_probs_chunk_size": -1,
        "entropy_coef": 0.0,
        "use_rollout_logprobs": False,
        "use_opsm": False,
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "eps_clip_c": 3.0,
        "get_mismatch_metrics": False,
        "use_tis": False,
        "custom_pg_loss_reducer_function_path": None,
        "use_kl_loss": False,
        "save_debug_train_data": None,
        "entropy_control": SETTINGS,
        "load": None,
        "save": None,
    }
    return Namespace(**values | others)


def batch_of(step: RecordedStep) -> tuple[dict[str, Any], Tensor, list[int]]:
    """slime's batch of a recorded step; the packed logits [1, T, V] as a leaf; the rows that predict responses."""
    logprobs, _ = step.statistics(step.logits)
    lengths = step.mask.sum(1).tolist()
    rows, places, at = [], [], 0
    for row, length in enumerate(lengths):
        packed = torch.zeros(PROMPT_LENGTH + length, step.logits.shape[-1])
        packed[PROMPT_LENGTH - 1 : -1] = step.logits[row, :length]
        rows.append(packed)
        places += [at + PROMPT_LENGTH - 1 + index for index in range(length)]
        at += PROMPT_LENGTH + length
    batch = {
        "unconcat_tokens": [
            torch.cat([torch.zeros(PROMPT_LENGTH, dtype=torch.int64), step.tokens[row, :length]])
            for row, length in enumerate(lengths)
        ],
        "total_lengths": [PROMPT_LENGTH + length for length in lengths],
        "response_lengths": lengths,
        "loss_masks": [torch.ones(length) for length in lengths],
        "log_probs": [logprobs[row, :length] for row, length in enumerate(lengths)],
        "advantages": [step.advantages[row].expand(length).clone() for row, length in enumerate(lengths)],
        "rollout_mask_sums": [torch.tensor(float(length)) for length in lengths],
    }
    return batch, torch.cat(rows).unsqueeze(0).requires_grad_(), places


def one_step(plugin: Any, args: Namespace, number: int, step: RecordedStep) -> Outcome:
    """slime's hook, then slime's loss, as its train_one_step calls them; the gradient is of the mean over tokens."""
    from slime.backends.megatron_utils.loss import loss_function

    plugin.before_train_step(args, number, 0, None, None, None)
    batch, leaf, places = batch_of(step)
    loss, tokens, _ = loss_function(args, batch, 1, len(batch["total_lengths"]), leaf * 1.0)
    (loss / tokens).backward()
    gradient = torch.zeros_like(step.logits)
    assert leaf.grad is not None
    gradient[step.mask] = leaf.grad[0, places]
    control = plugin._of_process[0].control
    return Outcome(control.controller.entropy, control.steering.alpha, gradient)


def test_recorded_steps_are_those_of_our_trainer(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on: slime has nothing measured before its first."""
    ours = our_trainer(monkeypatch, "previous_step")
    args = arguments("custom_loss")
    theirs = [one_step(plugin, args, number, step) for number, step in enumerate(recorded_steps())]
    assert theirs[0].alpha == 0.0
    assert_same("slime", theirs, ours, first=1)


def test_state_survives_a_save_and_a_load(plugin: Any, tmp_path: Path) -> None:
    from slime.backends.megatron_utils import model

    steps = recorded_steps()
    args = arguments("custom_loss", save=str(tmp_path), load=str(tmp_path))
    alphas = []
    for number, step in enumerate(steps):
        alphas.append(one_step(plugin, args, number, step).alpha)
        if number == 19:
            model.save_checkpoint(number, None)
    plugin._of_process.clear()
    model.save_checkpoint = lambda iteration, *others: None
    resumed = [one_step(plugin, args, number, step).alpha for number, step in enumerate(steps[20:], start=20)]
    assert resumed == alphas[20:]


def test_without_alpha_it_is_slimes_loss(plugin: Any) -> None:
    """On logits of a real vocabulary's size in the small: the same loss and gradient, without slime's copies."""
    from slime.backends.megatron_utils.loss import loss_function

    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, samples = 1024, 16384, 8
    each = tokens // samples
    ids = [torch.randint(vocabulary, (each,), generator=generator) for _ in range(samples)]
    base = torch.randn(tokens, 64, generator=generator) @ (0.5 * torch.randn(64, vocabulary, generator=generator))
    target = torch.cat([torch.cat([one[1:], one[:1]]) for one in ids])
    base[torch.arange(tokens), target] += 12
    logprobs = torch.log_softmax(base, dim=-1)[torch.arange(tokens), target].view(samples, each)
    response = each - 16
    batch = {
        "unconcat_tokens": ids,
        "total_lengths": [each] * samples,
        "response_lengths": [response] * samples,
        "loss_masks": [torch.ones(response)] * samples,
        "log_probs": [row[15:-1] + 0.05 * torch.randn(response, generator=generator) for row in logprobs],
        "advantages": [torch.randn(1, generator=generator).expand(response).clone() for _ in range(samples)],
        "rollout_mask_sums": [torch.tensor(float(response))] * samples,
    }
    results, seconds = [], []
    for kind in ("policy_loss", "custom_loss"):
        args = arguments(kind, entropy_control={"controller": "constant", "target": 1.0})
        plugin.before_train_step(args, 0, 0, None, None, None)
        best = float("inf")
        for _ in range(3):
            leaf = base.unsqueeze(0).clone().requires_grad_()
            started = time.perf_counter()
            loss, _, log = loss_function(args, batch, 1, samples, leaf * 1.0)
            loss.backward()
            best = min(best, time.perf_counter() - started)
        metrics = dict(zip(log["keys"], log["values"][1:].tolist(), strict=True))
        results.append((float(loss), metrics["entropy_loss"], leaf.grad))
        seconds.append(best)
    (theirs, their_entropy, their_gradient), (ours, our_entropy, our_gradient) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_entropy == pytest.approx(their_entropy, rel=1e-5)
    difference = float((our_gradient - their_gradient).abs().max())
    assert difference < 1e-5 * float(their_gradient.abs().max())
    sys.stdout.write(
        f"slime: loss {theirs:.7f} and {ours:.7f}, gradient differs by {difference:.2g}; "
        f"{seconds[0]:.3f} s and {seconds[1]:.3f} s\n"
    )
