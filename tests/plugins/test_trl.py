"""TRL's own trainer with our control: the Countdown model end to end, killed and resumed, on two processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from modules import load_module
from recorded import SETTINGS, Outcome, assert_same, our_trainer, recorded_steps
from transformers import TrainerCallback
from trl import GRPOTrainer

from megatron_entropic.algorithms import Steering
from megatron_entropic.config import names
from megatron_entropic.errors import UserError
from megatron_entropic.plugins.trl import EntropicGRPOTrainer, use_fused_head

ROOT = Path(__file__).resolve().parents[2]
example = load_module(ROOT / "examples/trl/countdown.py", "trl_countdown")
CONTROL = {"target": "0.9x", "kp": 2.0, "ki": 0.2, "tau": 0.7}
CONTROLLERS = sorted(set(names.CONTROLLERS) - {"p", "pi", "constant"})
SMALL = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 2,
    "seed": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def start(countdown_dir: Path) -> Path:
    """The Countdown model after few supervised steps."""
    folder = countdown_dir / "started"
    example.warm_start(countdown_dir, folder, steps=25)
    return folder


def has_a_sum(completions: list[str], **others: Any) -> list[float]:
    """A reward that few supervised steps are enough for: half of the responses get it."""
    return [float("+" in text) for text in completions]


def trained(start: Path, output: Path, control: dict[str, Any] | None = CONTROL, **settings: Any) -> Any:
    rows = example.prompt_rows(start.parent / "train.parquet")
    resume, callbacks = settings.pop("resume", None), settings.pop("callbacks", [])
    trainer = example.build_trainer(start, rows, output, control, **{**SMALL, **settings})
    trainer.reward_funcs[0] = has_a_sum
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


class Killed(TrainerCallback):
    """Ends a run in its fifth step, after the controller has advanced beyond the checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_entropy_is_measured_steers_and_a_killed_run_goes_on_as_if_never_stopped(start: Path, tmp_path: Path) -> None:
    whole = trained(start, tmp_path / "whole", max_steps=6)
    entropy, alpha = logged(whole, "entropy/mean"), logged(whole, "entropy/alpha")
    # The first step's scoring pass, then the previous step's window: what TRL measured itself.
    theirs = logged(whole, "entropy")
    assert entropy == pytest.approx([theirs[0], *theirs[:-1]], rel=1e-2)
    assert len(set(alpha)) > 3
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        trained(start, tmp_path / "killed", callbacks=[Killed()], **saving)
    assert not torch.equal(weights(whole), weights(trained(start, tmp_path / "begun", max_steps=1)))
    resumed = trained(start, tmp_path / "killed", resume=True, **saving)
    assert logged(resumed, "entropy/alpha") == alpha
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.entropy_control.state_dict() == whole.entropy_control.state_dict()


@pytest.fixture(scope="module")
def plain(start: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Weights after two steps of TRL's own trainer."""
    trainer = trained(start, tmp_path_factory.mktemp("plain"), None, max_steps=2)
    assert type(trainer) is GRPOTrainer
    return weights(trainer)


def test_without_anything_to_do_it_is_trls_trainer(start: Path, tmp_path: Path, plain: torch.Tensor) -> None:
    constant = {"controller": "constant", "rivals": {"alpha": 0.0}}
    assert torch.equal(weights(trained(start, tmp_path, constant, max_steps=2)), plain)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_controller_moves_the_weights(start: Path, tmp_path: Path, plain: torch.Tensor, controller: str) -> None:
    rivals = {"aec_step": 0.1, "aec_limit": 1.0, "bonus": 0.1, "dmmpt_probability": 0.05}
    rivals |= {"aer_eta": 0.1, "aer_limit": 1.0, "cascade_tau": [0.2, 0.98]}
    control = {"controller": controller, "target": 3.0, "tau": 0.3, "rivals": rivals}
    trainer = trained(start, tmp_path, control, max_steps=2)
    assert trainer.entropy_control.controller.step == 2
    if controller == "adapo":  # a clip, which holds no token on-policy
        assert trainer.epsilon_high > 0.2
    else:
        assert not torch.equal(weights(trainer), plain)


def test_our_fused_head_is_theirs(start: Path, tmp_path: Path) -> None:
    rows = example.prompt_rows(start.parent / "train.parquet")
    trainer = example.build_trainer(start, rows, tmp_path, CONTROL, max_steps=1, **SMALL)
    tokens = torch.randint(0, 18, (4, 12), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(tokens)

    def gradient() -> tuple[torch.Tensor, ...]:
        trainer.model.zero_grad()
        logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, tokens, attention, 6, compute_entropy=True
        )
        (logprobs.sum() + 0.3 * entropies.square().sum()).backward()
        return logprobs, entropies, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    theirs = gradient()
    use_fused_head(trainer.model, trainer.temperature)
    for mine, other in zip(gradient(), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-5)


def test_everything_that_is_wrong_is_one_message(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        trained(start, tmp_path, {"target": -1, "kpp": 2})
    assert "target" in str(caught.value)
    assert "kpp" in str(caught.value)
    with pytest.raises(UserError, match="another controller of the same entropy"):
        trained(start, tmp_path, CONTROL, entropy_coef=0.1)
    with pytest.raises(UserError, match="denominator"):
        trained(start, tmp_path, {"denominator": "high_prob_tokens"})


@pytest.mark.parametrize("feedback", ["score_pass", "previous_step"])
def test_recorded_steps_are_those_of_our_trainer(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feedback: str
) -> None:
    ours = our_trainer(monkeypatch, feedback)
    rows = example.prompt_rows(start.parent / "train.parquet")
    control = {**SETTINGS, "feedback": feedback}
    trainer = example.build_trainer(start, rows, tmp_path, control, max_steps=1, **{**SMALL, "loss_type": "bnpo"})
    trainer.current_gradient_accumulation_steps = 1
    theirs = []
    for step in recorded_steps():
        logits = step.logits.clone().requires_grad_()

        def statistics(*arguments: Any, x: Any = logits, recorded: Any = step, **options: Any) -> Any:
            return (*recorded.statistics(x), None)

        monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", statistics)
        inputs = {
            "prompt_ids": torch.zeros(len(step.tokens), 2, dtype=torch.int64),
            "prompt_mask": torch.ones(len(step.tokens), 2, dtype=torch.int64),
            "completion_ids": step.tokens,
            "completion_mask": step.mask.long(),
            "advantages": step.advantages,
        }
        trainer._step, trainer._buffered_inputs = 0, [inputs]
        trainer.model.train()
        EntropicGRPOTrainer._compute_loss(trainer, trainer.model, inputs).backward()
        steering = trainer.entropy_control.steering
        measured = trainer.entropy_control.controller.entropy
        trainer.end_window()
        theirs.append(Outcome(measured, steering.alpha, logits.grad))
    assert_same(f"TRL, {feedback}", theirs, ours)


@pytest.fixture
def losses(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function: (class, loss_type, steering, advantages) -> gradient of TRL's loss of a recorded step."""
    rows = example.prompt_rows(start.parent / "train.parquet")
    trainer = example.build_trainer(start, rows, tmp_path, CONTROL, max_steps=1, **SMALL)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    step = recorded_steps()[0]

    def gradient(kind: type, loss_type: str, steering: Steering, advantages: torch.Tensor) -> torch.Tensor:
        logits = step.logits.clone().requires_grad_()
        monkeypatch.setattr(
            GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *a, **b: (*step.statistics(logits), None)
        )
        trainer.loss_type = loss_type
        trainer._window = torch.zeros(3, dtype=torch.float64)
        trainer.entropy_control.steering = steering
        trainer.entropy_coef, trainer._entropy_bonus_enabled = steering.entropy_coefficient, steering != Steering()
        inputs = {
            "prompt_ids": torch.zeros(len(step.tokens), 2, dtype=torch.int64),
            "prompt_mask": torch.ones(len(step.tokens), 2, dtype=torch.int64),
            "completion_ids": step.tokens,
            "completion_mask": step.mask.long(),
            "advantages": advantages,
            "num_items_in_batch": step.mask.sum(),
            "entropic_success": torch.arange(8.0).unsqueeze(1) / 8,
        }
        kind._compute_loss(trainer, trainer.model, inputs).backward()
        assert logits.grad is not None
        return logits.grad

    gradient.step = step  # type: ignore[attr-defined]
    return gradient


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss_of_trl_takes_scaled_advantages(losses: Any, loss_type: str) -> None:
    """On-policy every one of them is linear in A: the gradient is that of A + alpha |A| on the likely tokens."""
    step = losses.step
    logprobs, _ = step.statistics(step.logits)
    rows = step.advantages.unsqueeze(1)
    scaled = rows - 0.5 * rows.abs() * (logprobs > math.log(0.7))
    ours = losses(EntropicGRPOTrainer, loss_type, Steering(alpha=-0.5), step.advantages)
    theirs = losses(GRPOTrainer, loss_type, Steering(), scaled)
    assert not torch.equal(theirs, losses(GRPOTrainer, loss_type, Steering(), step.advantages))
    torch.testing.assert_close(ours, theirs)


def test_an_entropy_bonus_by_success_is_that_of_the_formula(losses: Any) -> None:
    step = losses.step
    steering = Steering(entropy_coefficient=0.2, bonus_threshold=0.6)
    ours = losses(EntropicGRPOTrainer, "bnpo", steering, step.advantages)
    without = losses(GRPOTrainer, "bnpo", Steering(), step.advantages)
    logits = step.logits.clone().requires_grad_()
    _, entropies = step.statistics(logits)
    factors = (1 - torch.arange(8.0).unsqueeze(1) / 8 / 0.6).clamp(min=0)
    (-0.2 * (factors * entropies)[step.mask].sum() / step.mask.sum()).backward()
    assert logits.grad is not None
    torch.testing.assert_close(ours, without + logits.grad)


def test_our_head_is_refused_where_a_model_does_more_than_a_product(start: Path, tmp_path: Path) -> None:
    rows = example.prompt_rows(start.parent / "train.parquet")
    model = example.build_trainer(start, rows, tmp_path, None, max_steps=1, **SMALL).model
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="needs a plain causal language model"):
        use_fused_head(model, 1.0)


def dealt(start: Path, output: Path, batch: int) -> dict[str, Any]:
    """Three steps whose completions are a function of the prompt, not of chance, so that processes can be compared.

    Plain gradient descent: Adam makes a step of full size of a gradient that is rounding.
    """
    rows = example.prompt_rows(start.parent / "train.parquet")
    settings = {**SMALL, "per_device_train_batch_size": batch, "optim": "sgd", "learning_rate": 0.1}
    trainer = example.build_trainer(start, rows, output, CONTROL, max_steps=3, **settings)

    def generated(prompt_ids: list[list[int]], *others: Any, **options: Any) -> Any:
        answers = []
        for index, prompt in enumerate(prompt_ids):
            # Eight rows in a row have the same prompt.
            generator = torch.Generator().manual_seed(crc32(bytes(prompt)) + index % 8)
            answers.append(torch.randint(0, 14, (6,), generator=generator).tolist())
        return answers, None

    trainer._generate_single_turn = generated
    trainer.reward_funcs[0] = has_a_sum
    before = weights(trainer)
    trainer.train()
    trainer.model = trainer.accelerator.unwrap_model(trainer.model)
    alpha, entropy = logged(trainer, "entropy/alpha"), logged(trainer, "entropy/mean")
    return {"alpha": alpha, "entropy": entropy, "change": weights(trainer) - before}


def test_two_processes_equal_one(start: Path, tmp_path: Path) -> None:
    one = dealt(start, tmp_path / "one", 32)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            __file__,
            start,
            tmp_path,
        ],
        check=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{ROOT / 'tests'}"},
    )
    two = torch.load(tmp_path / "two.pt")
    assert one["entropy"] == pytest.approx(two["entropy"], rel=1e-6)
    assert one["alpha"] == pytest.approx(two["alpha"], rel=1e-5)
    largest = float(one["change"].abs().max())
    difference = float((one["change"] - two["change"]).abs().max())
    sys.stdout.write(f"TRL, two processes: weights move by up to {largest:.3g}, differ by up to {difference:.3g}\n")
    assert difference < 1e-4 * largest


if __name__ == "__main__":
    found = dealt(Path(sys.argv[1]), Path(sys.argv[2]) / "two", 16)
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[2]) / "two.pt")
