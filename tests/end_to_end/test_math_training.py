"""The whole loop on mathematics: real prompts, a byte-level BPE tokenizer, several rewards, resampling, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from math_assets import PROBLEMS, write_model
from string_rewards import boxed_as_it_is, first_digit_is_even
from training_run import Run

from megatron_entropic.cli import main
from megatron_entropic.observability.records import RecordedStep, read_rollouts, recorded_steps, rollouts_path

STEPS, PROMPTS, SAMPLES, LIMIT = 4, 4, 4, 24


def write_train_file(path: Path) -> Path:
    """The problems in the plain layout, with a copy, a row without a problem and one that is too long."""
    rows = [{"problem": text, "answer": answer} for text, answer in PROBLEMS]
    rows += [rows[0], {"problem": " ", "answer": "1"}, {"problem": "long " * 200, "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("math")
    config = {
        "run": {"name": "math", "output_dir": str(folder / "run")},
        "model": {"hf_dir": str(write_model(folder / "model")), "dtype": "float32"},
        "data": {
            "train_files": str(write_train_file(folder / "train.jsonl")),
            "max_prompt_tokens": 96,
            "too_long": "drop",
            "skip_malformed": True,
            "duplicates": "drop",
            "apply_chat_template": True,
            "system_prompt": "Be brief.",
            "prompt_suffix": " Put the answer in a box.",
        },
        "reward": {
            "verifier": "tests.end_to_end.string_rewards:first_digit_is_even",
            "added": {"tests.end_to_end.string_rewards:boxed_as_it_is": 1.0, "math": 1.0, "format": 0.1},
            "overlong_buffer_tokens": 8,
            "overlong_weight": 0.5,
        },
        "rollout": {
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "max_resamples": 2,
            "max_response_tokens": LIMIT,
            "kv_cache_gb": 0.1,
        },
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "logging": {"wandb": "off", "tensorboard": False, "rollouts_every_steps": 1},
        "cluster": {"device": "cpu"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run = Run(folder / "run", [str(folder / "config.yaml")])
    run.finish()
    return run


def steps_of(run: Run) -> list[RecordedStep]:
    return [read_rollouts(rollouts_path(run.directory, step)) for step in recorded_steps(run.directory)]


def test_prompts_are_rendered_and_responses_end_as_they_should(run: Run) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.directory.parent / "model")
    steps = steps_of(run)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    trajectories = [response.trajectory for step in steps for response in step.responses]
    assert len(trajectories) == STEPS * PROMPTS * SAMPLES
    for index, task in {one.task.index: one.task for one in trajectories}.items():
        text, answer = PROBLEMS[index]
        assert task.text == (
            f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{text} Put the answer in a box.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert tokenizer.decode(task.tokens) == task.text
        assert task.ground_truth == answer
    for one in trajectories:
        ended = one.continuation[-1] == tokenizer.eos_token_id
        assert ended == (one.finish_reason == "stop")
        assert ended or one.response_length == LIMIT
        assert one.text == tokenizer.decode(one.continuation, skip_special_tokens=True)
        assert len(one.rollout_logprobs) == one.response_length
    assert {one.finish_reason for one in trajectories} == {"stop", "length"}


def test_rewards_are_the_weighted_sum(run: Run) -> None:
    for step in steps_of(run):
        for response in step.responses:
            one, reward = response.trajectory, response.reward
            truth, text, length = one.task.ground_truth, one.text, one.response_length
            assert reward.status == "ok"
            assert reward.verifier == first_digit_is_even(text, truth, {})
            assert "\\boxed" not in text, "math and format give nothing"
            punishment = min(max(length - (LIMIT - 8), 0) / 8, 1)
            expected = reward.verifier + boxed_as_it_is(text, truth, {}) - 0.5 * punishment
            assert reward.value == pytest.approx(expected)


def test_groups_all_alike_are_replaced_and_counted(run: Run) -> None:
    rows = run.metrics()
    assert sum(row["resampling/replaced_groups"] for row in rows) > 0
    for row, step in zip(rows, steps_of(run), strict=True):
        groups = step.groups()
        assert [len(group.trajectories) for group in groups] == [SAMPLES] * PROMPTS
        alike = sum(len({reward.verifier for reward in group.rewards}) == 1 for group in groups)
        assert row["resampling/left_groups"] == alike
        assert row["resampling/rounds"] <= 2
        assert alike == 0 or row["resampling/rounds"] == 2
        indices = [group.task.index for group in groups]
        assert len(set(indices)) == PROMPTS


def test_the_share_of_judging_is_a_metric(run: Run) -> None:
    """It says nothing about real runs here: all responses of a step come within a few tenths of a second."""
    for row in run.metrics():
        assert row["time/reward_fraction"] == pytest.approx(row["time/reward_s"] / row["time/step_s"])
        assert 0 < row["time/reward_fraction"] < 1


def test_what_became_of_the_rows_is_told(run: Run) -> None:
    report = (run.directory / "data_report.txt").read_text(encoding="utf-8")
    for part in (
        "train.jsonl: 19 rows",
        "skipped as malformed: 1 findings",
        "line 18: the prompt in problem is empty",
        "dropped as longer than data.max_prompt_tokens: 1",
        "1 copies of earlier problems (dropped)",
        "prompts of the run: 16",
    ):
        assert part in report
    assert report in run.log.read_text(encoding="utf-8").replace("\r", "")


def test_a_resumed_run_takes_the_same_prompts_at_another_data_parallel_size(run: Run, tmp_path: Path) -> None:
    """Steps 3 and 4 again from the checkpoint of step 2, on two ranks instead of one; replacements included."""
    again = Run(tmp_path / "run", [*run.arguments, f"run.output_dir={tmp_path / 'run'}", "policy.data_parallel=2"])
    shutil.copytree(run.directory, again.directory)
    shutil.rmtree(again.directory / "checkpoints/step_00000004")
    shutil.rmtree(again.directory / "hf")
    shutil.rmtree(again.directory / "rollouts")
    again.finish()
    assert recorded_steps(again.directory) == [3, 4]
    assert [asked(step) for step in steps_of(again)] == [asked(step) for step in steps_of(run)[2:]]
    replaced = [[row["resampling/replaced_groups"] for row in one.metrics()] for one in (again, run)]
    assert replaced[0] == replaced[1]


def asked(step: RecordedStep) -> list[tuple[int, int]]:
    return [(one.trajectory.task.index, one.trajectory.sample_index) for one in step.responses]


def test_training_does_not_start_on_malformed_rows(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [f"run.output_dir={tmp_path / 'run'}", "data.skip_malformed=false"]
    assert main(["train", *run.arguments, *again]) == 2
    message = capsys.readouterr().err
    assert "line 18: the prompt in problem is empty" in message
    assert "1 problem(s)" in message
