"""Signals become a flag and an error of their own, lost processes another attempt; skipped steps are counted."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.config.run import Config
from megatron_entropic.errors import Interrupted, PeerDied, PhaseTimeout, RunError, StopAsked
from megatron_entropic.training import trainer
from megatron_entropic.training.lifecycle import SkipLimit, StopRequest, attempts
from megatron_entropic.training.sft import warm_start


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored, tests too."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


class Restarts:
    """Stands where the run directory does."""

    def __init__(self) -> None:
        self.causes: list[RunError] = []

    def record_restart(self, restart: int, limit: int, error: RunError) -> None:
        self.causes.append(error)


def attempted(outcomes: list[RunError | None], run: Any, stop: StopRequest, max_restarts: int) -> None:
    """A run whose attempts end with the outcomes, one after the other."""
    left = iter(outcomes)
    for attempt in attempts(run, stop, max_restarts):
        with attempt:
            if (outcome := next(left)) is not None:
                raise outcome


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_heard_and_the_former_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.raise_if_asked()
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(StopAsked, match=f"asked to stop by {number.name}"):
            stop.raise_if_asked()
    assert signal.getsignal(number) == before


def test_ctrl_c_during_the_start_ends_the_run_before_the_next_part_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on for a minute, to save what was as new as before."""
    started = []

    @contextmanager
    def launch(_config: Config, announce: Callable[[str], None]) -> Iterator[None]:
        announce("starting Ray")
        started.append("Ray")
        os.kill(os.getpid(), signal.SIGINT)
        announce("loading the policy")
        started.append("policy")
        yield

    tasks = SimpleNamespace(report=SimpleNamespace(lines=list))
    inputs = SimpleNamespace(scorer=None, evaluator=None, tasks=tasks, lessons=[])
    monkeypatch.setattr(trainer, "open_inputs", lambda _config: nullcontext(inputs))
    monkeypatch.setattr(trainer, "launch", launch)
    sections = {"run": {"output_dir": tmp_path}, "model": {"hf_dir": tmp_path}, "data": {"train_files": [tmp_path]}}
    with pytest.raises(Interrupted, match="asked to stop by SIGINT"):
        trainer.train(Config.model_validate(sections | {"logging": {"wandb": "off", "tensorboard": False}}))
    assert started == ["Ray"]


def test_a_signal_during_the_supervised_start_ends_it_before_its_next_step() -> None:
    """It was heard only after the first step of reinforcement learning, which can be ten minutes later."""
    learnt: list[int] = []

    def learn(lesson: list[Any]) -> dict[str, float]:
        learnt.append(len(learnt) + 1)
        if len(learnt) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    cluster: Any = SimpleNamespace(training=lambda: nullcontext(SimpleNamespace(warm_start_step=learn)))
    run: Any = SimpleNamespace(journal=SimpleNamespace(record_warm_start=lambda step, metrics: None))
    with StopRequest() as stop, pytest.raises(StopAsked, match="asked to stop by SIGTERM"):
        warm_start(cluster, run, [[]] * 5, stop)
    assert learnt == [1, 2]


def test_ctrl_c_saves_and_ctrl_c_again_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert "Ctrl-C again ends it at once" in capfd.readouterr().err
        with pytest.raises(Interrupted, match="asked to stop by SIGINT"):
            stop.raise_if_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_run_in_the_background_of_a_script_does_not_hear_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def signalled_run(run: Any, number: signal.Signals, outcome: RunError) -> None:
    """A run that may start again five times, is signalled and loses a process."""
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        attempted([outcome], run, stop, max_restarts=5)


def test_processes_that_go_after_the_signal_belong_to_the_request() -> None:
    run = Restarts()
    with pytest.raises(StopAsked, match=r"SIGTERM, and processes of the run were ended too: update: rank 1 died"):
        signalled_run(run, signal.SIGTERM, PeerDied("update: rank 1 died"))
    assert not run.causes, "who is asked to stop does not start again"


def test_without_a_signal_errors_pass() -> None:
    with pytest.raises(PeerDied, match="rank 1 died"), StopRequest():
        raise PeerDied("rank 1 died")


def test_lost_processes_lead_to_new_attempts() -> None:
    run: Any = Restarts()
    causes = [PeerDied("rank 1"), PhaseTimeout("engine 0")]
    with StopRequest() as stop:
        attempted([*causes, None], run, stop, max_restarts=2)
    assert run.causes == causes


def test_the_last_attempt_and_other_errors_end_the_run() -> None:
    run: Any = Restarts()
    with StopRequest() as stop:
        with pytest.raises(PeerDied, match="second"):
            attempted([PeerDied("first"), PeerDied("second")], run, stop, max_restarts=1)
        with pytest.raises(RunError, match="out of memory"):
            attempted([RunError("out of memory")], run, stop, max_restarts=5)
    assert len(run.causes) == 1


def test_skipped_steps_end_the_run_when_they_come_in_a_row() -> None:
    skips = SkipLimit(3)
    for step, skipped in enumerate([1.0, 1.0, 0.0, 0.5, 1.0], start=1):
        skips.observe(step, {"optimizer/skipped": skipped})
    with pytest.raises(RunError, match=r"step 6: .* 3 steps in a row \(train.max_skipped_steps\)"):
        skips.observe(6, {"optimizer/skipped": 1.0})
