"""Recorded rollouts in the terminal and as a page: every token once, with the marks that its numbers demand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from trajectories import reward_of, task_of, trajectory_of
from transformers import PreTrainedTokenizerFast

from megatron_entropic.cli import main
from megatron_entropic.commands.rollouts import _heading
from megatron_entropic.observability.records import read_rollouts, rollouts_path, write_rollouts
from megatron_entropic.reports.rollouts import Excerpt, ResponseView, token_texts, view_step
from megatron_entropic.types import Group, Scores, Sequence, TrainingBatch

TEXT = "So <b>x</b> is \\boxed{4} or \u00e9\u6f22\U0001f642 done"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator([TEXT], vocab_size=270, show_progress=False, special_tokens=["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token="<|end|>")
    tokenizer.save_pretrained(tmp_path_factory.mktemp("model"))
    return tokenizer


def write_run(directory: Path, tokenizer: Any, model: Path, question: str = "Question") -> Path:
    """Three prompts of two responses; the first token is sure, and only the first response has A > 0."""
    tokens = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    count = len(tokens)
    groups, sequences = [], []
    for number in range(3):
        task = task_of(10 + number, text=f"{question} {number} & more", truth="4")
        attempts = tuple(trajectory_of(task, k, tokens, TEXT, logprobs=[-0.5] * count) for k in range(2))
        groups.append(Group(attempts, (reward_of(1.0), reward_of(0.0))))
        sequences += [Sequence(torch.tensor([1, *tokens]), 1, advantages=torch.full((count,), a)) for a in (1.0, -1.0)]
    scores = Scores([torch.tensor([-0.01] + [-1.0] * (count - 1))] * 6, [torch.linspace(0, 2, count)] * 6)
    metrics = {"entropy/alpha": -0.125}
    batch = TrainingBatch(tuple(groups), tuple(sequences))
    write_rollouts(rollouts_path(directory, 3), 3, batch, scores, metrics)
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 3, **metrics}) + "\n")
    (directory / "config.yaml").write_text(
        f"run: {{name: shown}}\nmodel: {{hf_dir: {model}}}\nreward: {{verifier: math}}\n"
        "entropy_control: {controller: pi, tau: 0.95}\n"
    )
    return directory


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(tmp_path / "model")
    return write_run(tmp_path / "run", tokenizer, tmp_path / "model")


def test_token_texts_add_up_whatever_characters_are_cut_into(tokenizer: Any) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(tokenizer("\U0001f642", add_special_tokens=False)["input_ids"]) > 1
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in text for text in texts)
    assert token_texts(ids[:-6][: len(ids)], tokenizer)
    assert token_texts([], tokenizer) == []


def test_marks_are_those_of_tau_and_the_advantage(run: Path, tokenizer: Any) -> None:
    recorded = read_rollouts(rollouts_path(run, 3))
    view = view_step(recorded, tokenizer, lambda text: "4", tau=0.95, excerpt=Excerpt([11], max_tokens=10))
    (group,) = view.groups
    assert (group.index, view.prompts, view.alpha) == (11, 3, -0.125)
    for response, mark in zip(group.responses, ("up", "down"), strict=True):
        assert [token.touch for token in response.tokens] == [mark] + [""] * 9
        assert response.hidden == len(response.recorded.entropies) - 10
        assert response.touched == pytest.approx(0.1)
    assert all(
        token.touch == ""
        for g in view_step(recorded, tokenizer, str, tau=None).groups
        for token in g.responses[0].tokens
    )
    with pytest.raises(ValueError, match="step 3 has no prompt 99; it has 10, 11, 12"):
        view_step(recorded, tokenizer, str, tau=None, excerpt=Excerpt([99]))


def test_the_terminal_shows_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(run), "--prompt", "12"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("step 3: 1 of 3 prompts, alpha -0.1250, tau 0.95", "Question 2 & more", "answer read: 4", "A -1.000"):
        assert part in shown
    assert shown.count("done<|end|>") == 2


def test_a_conversation_says_how_it_ended_and_no_answer(run: Path, tokenizer: Any) -> None:
    """`answer read: none` stood beside rewards that an environment had given."""
    recorded = read_rollouts(rollouts_path(run, 3)).responses[0]
    ended = replace(recorded, trajectory=replace(recorded.trajectory, ending="done"))
    heading = _heading(ResponseView(ended, answer=None, tokens=[], hidden=0, cut=0)).plain
    assert "conversation ended: done" in heading
    assert "answer read" not in heading


def test_the_page_holds_every_token_once_and_escapes_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "out/page.html"
    assert main(["rollouts", str(run), "--html", str(page), "--prompts", "3"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    bodies = re.findall(r'<pre class="text response tokens">(.*?)</pre>', text, re.DOTALL)
    assert len(bodies) == 6
    plain = re.sub(r"<[^>]+>", "", bodies[0]).replace("&lt;", "<").replace("&gt;", ">")
    assert plain == TEXT + "<|end|>"
    assert bodies[0].count('class="up"') == bodies[1].count('class="down"') == 1
    assert "src=" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_what_is_not_there_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(run), "--step", "5"]) == 2
    assert "no rollouts of step 5; there are 3" in capsys.readouterr().err
    rollouts_path(run, 3).unlink()
    assert main(["rollouts", str(run)]) == 2
    assert "no rollouts are recorded: logging.rollouts_every_steps=0 records none" in capsys.readouterr().err


def test_a_prompt_that_comes_twice_in_a_row_is_shown_as_two_groups(run: Path, tokenizer: Any) -> None:
    recorded = read_rollouts(rollouts_path(run, 3))
    task = recorded.responses[0].trajectory.task
    same = [replace(one, trajectory=replace(one.trajectory, task=task)) for one in recorded.responses]
    view = view_step(
        replace(recorded, responses=same), tokenizer, lambda text: "4", tau=0.95, excerpt=Excerpt(max_prompts=9)
    )
    assert [(group.index, len(group.responses)) for group in view.groups] == [(10, 2)] * 3


def test_prompts_whose_rewards_differ_are_shown_first(run: Path, tokenizer: Any) -> None:
    recorded = read_rollouts(rollouts_path(run, 3))
    alike = [replace(one, reward=reward_of(0.0)) for one in recorded.responses[:2]]
    recorded = replace(recorded, responses=[*alike, *recorded.responses[2:]])
    view = view_step(recorded, tokenizer, lambda text: "4", tau=0.95, excerpt=Excerpt(max_prompts=3))
    assert [group.index for group in view.groups] == [11, 12, 10]


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A response may hold what would clear the screen, set the title or hide the rest."""
    tokenizer.save_pretrained(tmp_path / "model")
    run = write_run(tmp_path / "run", tokenizer, tmp_path / "model", "Clear\x1b[2J \x9b1m\r&")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("math", "nowhere:at_all"))
    assert main(["rollouts", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "\r" not in shown
    assert "Clear\u241b[2J \\u009b1m\u240d& 0" in shown
    assert "answers are not read: verifier=nowhere:at_all: nowhere cannot be imported" in shown


def test_a_run_whose_model_is_gone_is_shown_with_another_tokenizer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(["rollouts", str(run)]) == 2
    assert "no such model directory; --tokenizer DIR takes another one" in capsys.readouterr().err
    assert main(["rollouts", str(run), "--tokenizer", str(tmp_path / "moved")]) == 0
