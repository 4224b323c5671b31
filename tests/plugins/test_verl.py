"""verl's own package with our control: its registries, its loss functions, the driver's methods on its batches."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import verl  # loads the plug-in by its entry point
from omegaconf import OmegaConf
from recorded import PROMPT_LENGTH, SETTINGS, Outcome, RecordedStep, assert_same, our_trainer, recorded_steps
from tensordict import TensorDict
from torch import Tensor, multiprocessing
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base, trainer_sync
from verl.utils import tensordict_utils
from verl.workers import engine_workers
from verl.workers.config import ActorConfig, FSDPActorConfig

from megatron_entropic.errors import UserError
from megatron_entropic.plugins import verl as plugin

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def actor_config(mode: str = "token-mean", loss: str = "vanilla", **others: Any) -> ActorConfig:
    return FSDPActorConfig(
        strategy="fsdp",
        rollout_n=8,
        ppo_mini_batch_size=8,
        ppo_micro_batch_size_per_gpu=8,
        loss_agg_mode=mode,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        policy_loss={"loss_mode": loss},
        **others,
    )


def test_import_of_verl_loads_the_plugin() -> None:
    assert verl.__version__
    assert get_policy_loss_fn("entropic") is plugin.entropic_policy_loss
    for mode in ("sync", "colocate_async", "separate_async"):
        assert issubclass(get_trainer_cls(f"entropic_{mode}"), get_trainer_cls(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.0, -0.7, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_our_loss_is_verls_where_no_clip_holds_a_token(mode: str, alpha: float, weighted: bool) -> None:
    """Against verl's own with advantages scaled by 1 + alpha sign(A).

    Without alpha, ratios reach beyond both bounds and, on some tokens, the dual clip.
    """
    generator = torch.Generator().manual_seed(5)
    shape = (16, 40)
    old = -torch.rand(shape, generator=generator) * 0.2 - 1e-3
    noise = 0.6 if alpha == 0.0 else 0.04
    logprobs = (old + noise * torch.randn(shape, generator=generator)).clamp(max=-1e-3)
    advantages = torch.randn(16, 1, generator=generator).expand(shape).contiguous()
    mask = (torch.rand(shape, generator=generator) < 0.8).float()
    weights = torch.rand(shape, generator=generator) + 0.5 if weighted else None
    config = actor_config(mode, clip_ratio_c=1.5)
    results = []
    high = (logprobs > math.log(0.95)).float()
    scaled = advantages * (1 + alpha * advantages.sign() * high)
    for name, given in (("entropic", advantages), ("vanilla", scaled)):
        x = logprobs.clone().requires_grad_()
        token = plugin._term.set((alpha, 0.95))
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=x,
            advantages=given,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
        plugin._term.reset(token)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    (ours, our_gradient), (theirs, their_gradient) = results
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert float((our_gradient - their_gradient).abs().max()) < 1e-5 * float(their_gradient.abs().max())


class Queue:
    """verl's TransferQueue, in this process: fields by name, nested [B, R]."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        found = {name: self.fields[name] for name in select_fields if name in self.fields}
        return TensorDict(found, batch_size=len(keys))

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> Any:
        self.fields |= dict(fields.items())
        return self.batch

    @property
    def batch(self) -> Any:
        return Batch(len(self.fields["response_mask"]))


class Batch:
    """Stands for verl's KVBatchMeta: keys, and what travels to the workers."""

    def __init__(self, size: int) -> None:
        self.keys = [f"{index}_0" for index in range(size)]
        self.partition_id = "train"
        self.extra_info: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.keys)


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class Workers:
    """verl's workers, in this process: the scoring pass and the loss of a recorded step; the loss is verl's own."""

    def __init__(self, queue: Queue, actor: ActorConfig) -> None:
        self._queue = queue
        self._loss = partial(engine_workers.ppo_loss, config=actor)
        self.step: RecordedStep
        self.gradient: Tensor

    def take(self, step: RecordedStep) -> Any:
        self.step = step
        lengths = step.mask.sum(1).tolist()
        self._queue.fields = {
            "response_mask": nested([torch.ones(length, dtype=torch.int64) for length in lengths]),
            "prompts": nested([torch.zeros(PROMPT_LENGTH, dtype=torch.int64) for _ in lengths]),
            "responses": nested([step.tokens[row, :length] for row, length in enumerate(lengths)]),
            "uid": nested([torch.zeros(1, dtype=torch.int64) for _ in lengths]),
            "rm_scores": nested([torch.zeros(length) for length in lengths]),
        }
        return self._queue.batch

    def _whole_sequences(self, values: Tensor) -> Tensor:
        """[B, R] as verl's engines return it: over prompt and response, each value one token early."""
        lengths = self.step.mask.sum(1).tolist()
        edge = values.new_zeros(1)
        return nested(
            [
                torch.cat([values.new_zeros(PROMPT_LENGTH - 1), values[row, :length], edge])
                for row, length in enumerate(lengths)
            ]
        )

    def compute_log_prob(self, batch: Any) -> Any:
        logprobs, entropies = self.step.statistics(self.step.logits)
        self._queue.fields["log_probs"] = self._whole_sequences(logprobs)
        self._queue.fields["entropy"] = self._whole_sequences(entropies)
        return batch

    def update_actor(self, batch: Any) -> Any:
        logits = self.step.logits.clone().requires_grad_()
        logprobs, _ = self.step.statistics(logits)
        fields = {
            name: self._queue.fields[name]
            for name in ("prompts", "responses", "response_mask", "old_log_probs", "advantages")
        }
        data = TensorDict(fields, batch_size=len(batch))
        extra = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **batch.extra_info}
        for name, value in extra.items():
            tensordict_utils.assign_non_tensor_data(data, name, value)
        loss, _ = self._loss(model_output={"log_probs": self._whole_sequences(logprobs)}, data=data)
        loss.backward()
        assert logits.grad is not None
        self.gradient = logits.grad
        return {"metrics": {"mfu": [0.0], "grad_norm": [float(logits.grad.norm())]}}


def driver(
    monkeypatch: pytest.MonkeyPatch, folder: Path, loss: str = "vanilla", **control: Any
) -> tuple[Any, Workers, Queue]:
    """A driver as far as the methods that we override reach, over workers in this process."""
    queue = Queue()
    actor = {
        "policy_loss": {"loss_mode": loss},
        "loss_agg_mode": "token-mean",
        "loss_scale_factor": None,
        "ppo_mini_batch_size": 8,
        "calculate_entropy": False,
        "entropy_coeff": 0.0,
        "ppo_epochs": 1,
        "data_loader_seed": 1,
        "shuffle": False,
        "checkpoint": {},
    }
    config = OmegaConf.create(
        {
            "entropy_control": {**SETTINGS, **control},
            "algorithm": {"use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {
                "actor": actor,
                "rollout": {"temperature": 1.0, "calculate_log_probs": False, "n": 8},
            },
            "trainer": {
                "v1": {"trainer_mode": "entropic_sync"},
                "default_local_dir": str(folder),
                "default_hdfs_dir": None,
                "resume_mode": "auto",
                "del_local_ckpt_after_load": False,
            },
        }
    )
    for module in (trainer_base.tq, plugin.transfer_queue):
        monkeypatch.setattr(module, "kv_batch_get", queue.kv_batch_get)
        monkeypatch.setattr(module, "kv_batch_put", queue.kv_batch_put)
    # What verl's own constructor and worker groups need is GPUs and Ray.
    monkeypatch.setattr(trainer_sync.PPOTrainer, "__init__", lambda self, given: setattr(self, "config", given))
    trainer = get_trainer_cls("entropic_sync")(config)
    trainer.trainer_mode, trainer.use_critic, trainer.global_steps = "sync", False, 0
    trainer.distillation_config = None
    workers = Workers(queue, actor_config(loss=loss, clip_ratio_c=3.0))
    trainer.actor_rollout_wg = workers
    return trainer, workers, queue


def one_step(trainer: Any, workers: Workers, step: RecordedStep, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """The part of verl's `_step_once` that concerns the policy, on a recorded step with its recorded advantages."""

    def advantages(data: Any, **others: Any) -> Any:
        data.batch["advantages"] = step.advantages.unsqueeze(1).expand(step.mask.shape) * step.mask
        data.batch["returns"] = data.batch["advantages"]
        return data

    monkeypatch.setattr(trainer_base, "compute_advantage_for_multi_trajectories", advantages)
    metrics: dict[str, Any] = {}
    batch = trainer._compute_old_log_prob(workers.take(step), metrics)
    batch = trainer._compute_advantage(batch, metrics)
    trainer._update_actor(batch, metrics)
    return Outcome(metrics["entropy/mean"], metrics["entropy/alpha"], workers.gradient)


@pytest.mark.parametrize("loss", ["vanilla", "entropic"])
def test_recorded_steps_are_those_of_our_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """On-policy no clip holds a token, so the published form is the same too."""
    ours = our_trainer(monkeypatch, "score_pass")
    trainer, workers, _ = driver(monkeypatch, tmp_path, loss)
    assert trainer.config.trainer.v1.trainer_mode == "sync"
    theirs = [one_step(trainer, workers, step, monkeypatch) for step in recorded_steps()]
    assert_same(f"verl, loss {loss}", theirs, ours)


def test_prompts_have_alphas_by_their_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of four responses: none of the first is right, all of the second are."""
    trainer, workers, queue = driver(monkeypatch, tmp_path, controller="unsolved", tau=0.0)
    step = recorded_steps()[0]
    take = workers.take

    def judged(given: RecordedStep) -> Any:
        batch = take(given)
        lengths = given.mask.sum(1).tolist()
        queue.fields["uid"] = nested([torch.tensor([row // 4]) for row in range(8)])
        queue.fields["rm_scores"] = nested(
            [torch.full((length,), float(row > 3)) for row, length in enumerate(lengths)]
        )
        return batch

    monkeypatch.setattr(workers, "take", judged)
    one_step(trainer, workers, step, monkeypatch)
    scaled = queue.fields["advantages"].to_padded_tensor(0.0)
    steering = trainer.entropy_control.steering
    assert steering.prompt_alpha is not None
    alphas = steering.alphas(torch.tensor([0.0, 1.0])).repeat_interleave(4)
    expected = step.advantages + alphas * step.advantages.abs()
    assert alphas[0] < -0.1
    torch.testing.assert_close(scaled[:, 0], expected)


def test_state_survives_a_save_and_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    base = get_trainer_cls("sync").__mro__[1]
    monkeypatch.setattr(base, "_save_checkpoint", lambda self: saved.append("verl"))
    monkeypatch.setattr(base, "_load_checkpoint", lambda self: setattr(self, "global_steps", 20))
    whole, workers, _ = driver(monkeypatch, tmp_path)
    steps = recorded_steps()
    alphas = []
    for number, step in enumerate(steps, start=1):
        alphas.append(one_step(whole, workers, step, monkeypatch).alpha)
        if number == 20:
            whole.global_steps = number
            whole._save_checkpoint()
    assert saved == ["verl"]
    resumed, workers, _ = driver(monkeypatch, tmp_path)
    resumed._load_checkpoint()
    assert [one_step(resumed, workers, step, monkeypatch).alpha for step in steps[20:]] == alphas[20:]
    assert resumed.entropy_control.state_dict() == whole.entropy_control.state_dict()


def test_settings_without_effect_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="fixes the coefficient of the entropy"):
        driver(monkeypatch, tmp_path, controller="aec")
    with pytest.raises(UserError, match="gets alpha only"):
        driver(monkeypatch, tmp_path, "entropic", controller="unsolved")
    with pytest.raises(UserError, match="scores every batch anyway"):
        driver(monkeypatch, tmp_path, feedback="previous_step")
    with pytest.raises(UserError, match="ratio_clip"):
        driver(monkeypatch, tmp_path, "entropic", ratio_clip="ppo")
    with pytest.raises(UserError, match="no settings"):
        get_trainer_cls("entropic_sync")(OmegaConf.create({}))


def test_the_published_loss_without_our_trainer_is_refused() -> None:
    rows = torch.zeros(1, 2)
    with pytest.raises(UserError, match="entropic_sync"):
        plugin.entropic_policy_loss(rows, rows, rows, torch.ones(1, 2), config=actor_config(loss="entropic"))


def test_our_operation_stands_in_for_verls_megatron_head() -> None:
    """Against the formula, a padded token's temperature of 0 included."""
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(2, 7, 50, generator=generator).requires_grad_()
    label = torch.randint(0, 50, (2, 7), generator=generator)
    temperature = torch.full((2, 7), 0.7)
    temperature[1, 6] = 0.0
    engine = SimpleNamespace()
    head = plugin.head_outputs(lambda *arguments, **options: {"own": torch.zeros(1)}, lambda: None)
    options = dict.fromkeys(("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"), False)
    outputs = head(engine, leaf * 1.0, label, temperature, calculate_entropy=True, **options)
    expected = torch.log_softmax(leaf / 0.7, dim=-1)
    chosen = expected.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    entropy = -(expected.exp() * expected).sum(-1)
    counts = temperature > 0
    torch.testing.assert_close(outputs["log_probs"][counts], chosen[counts])
    torch.testing.assert_close(outputs["entropy"][counts], entropy[counts])
    (ours,) = torch.autograd.grad((outputs["log_probs"] + 0.1 * outputs["entropy"])[counts].sum(), leaf)
    (theirs,) = torch.autograd.grad((chosen + 0.1 * entropy)[counts].sum(), leaf)
    torch.testing.assert_close(ours[counts], theirs[counts], rtol=1e-4, atol=1e-6)
    others = head(
        engine, leaf * 1.0, label, temperature, calculate_entropy=True, **options | {"distillation_only": True}
    )
    assert "own" in others


def ranks_of_the_head(rank: int, folder: str) -> None:
    """One of two tensor-parallel ranks: verl's own head, with verl's own functions, against ours on the same shard."""
    from megatron.core import mpu
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mpu.initialize_model_parallel(2)
    # verl compiles one product of two tensors, which takes a compiler and half a minute here.
    torch.compile = lambda **options: lambda function: function  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(2)
    whole = 3 * torch.randn(1, 40, 64, generator=generator)
    label = torch.randint(0, 64, (1, 40), generator=generator)
    original = MegatronEngineWithLMHead._lm_head_logits_processor
    ours = plugin.head_outputs(original, mpu.get_tensor_model_parallel_group)
    options = dict.fromkeys(("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"), False)
    options |= {"calculate_entropy": True, "logits_processor_func": None, "batch": None, "data_format": "thd"}
    engine = SimpleNamespace(engine_config=SimpleNamespace(entropy_from_logits_with_chunking=False))
    found = []
    for head in (original, ours):
        leaf = whole[..., 32 * rank : 32 * (rank + 1)].clone().requires_grad_()
        outputs = head(engine, leaf * 1.0, label, torch.full((1, 40), 0.8), **options)
        (outputs["log_probs"] - 0.2 * outputs["entropy"]).sum().backward()
        found.append((outputs["log_probs"].detach(), outputs["entropy"].detach(), leaf.grad))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_our_operation_equals_verls_megatron_head_over_two_ranks(tmp_path: Path) -> None:
    multiprocessing.start_processes(ranks_of_the_head, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        theirs, ours = torch.load(tmp_path / f"{rank}.pt")
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_loss_of_the_workers_is_the_wrapped_one() -> None:
    """Else alpha would not reach the published form: verl's workers take the function from this module."""
    assert engine_workers.ppo_loss.__wrapped__.__module__ == "verl.workers.utils.losses"
