"""Environments of other packages, in their locked versions and in processes of environments, as a run has them.

verifiers hosts its word game, OpenEnv the environment that `openenv init` writes, behind its own server.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from trajectories import task_of
from transformers import PreTrainedTokenizerFast

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.environments.conversation import Answer, Call, Ending, Key
from megatron_entropic.environments.host import EnvironmentHost
from megatron_entropic.environments.text import plain_tokens
from megatron_entropic.types import Task

HOSTS, OPENENV = Path(sys.prefix) / "hosts", Path(sys.prefix) / "hosts_openenv"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of characters with a chat template that TRL knows, one that keeps earlier turns."""
    folder = tmp_path_factory.mktemp("model")
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    core = Tokenizer(models.WordLevel({one: place for place, one in enumerate(characters)}, "?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(one, special=True) for one in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="?")
    tokenizer.chat_template = (HOSTS / "trl/chat_templates/qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


class Talk:
    """One conversation with a host, as the sampling client has it."""

    def __init__(self, host: EnvironmentHost, model_dir: Path, task: Task) -> None:
        self._host, self._task = host, task
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
        self.turns: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []

    def asked(self, last: Ending = "", sample: int = 0) -> Answer:
        key = Key("1/0", sample, len(self.turns))
        call = Call(key, self._task, tuple(self.turns), tuple(self.answers[: len(self.turns)]), 10_000, 10_000, last)
        came: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._host.ask(call, came.put)
        answer = came.get(timeout=120)
        assert not answer.message
        if answer.tokens is not None and not sample:
            self.answers.append(answer.tokens)
        return answer

    def says(self, text: str, last: Ending = "") -> str | None:
        """What the environment answers to a turn; None: it is over."""
        self.turns.append(np.array([*plain_tokens(self.tokenizer, text), self.tokenizer.eos_token_id], np.int32))
        self.answer = self.asked(last)
        return None if self.answer.tokens is None else self.text(self.answer.tokens)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens))


def opened(host: EnvironmentHost, model_dir: Path, task: Task) -> tuple[Talk, str]:
    talk = Talk(host, model_dir, task)
    answer = talk.asked()
    assert answer.tokens is not None
    return talk, talk.text(answer.tokens)


def host_of(name: str, settings: dict[str, Any], model_dir: Path, packages: Path = HOSTS) -> EnvironmentHost:
    config = EnvironmentConfig(name=name, settings=settings, packages_dir=packages)
    return EnvironmentHost(config, model_dir)


def test_a_game_of_verifiers(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout, the game and the reward are verifiers' own; what is scored at a limit is what was reached."""
    corpus = tmp_path / "corpora/words"
    corpus.mkdir(parents=True)
    (corpus / "en").write_text("noon\n")
    (corpus / "en-basic").write_text("noon\n")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    # The game asks for its list of words where it is published, and goes on without an answer.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    environment = {"taskset": {"id": "textarena", "game": "Hangman-v0"}}
    with host_of("verifiers", {"environment": environment}, model_dir) as host:
        assert host.gives_reward
        talk, opening = opened(host, model_dir, task_of(3))
        assert opening.startswith("<|im_start|>system\nYou are a competitive game player.")
        assert opening.endswith("<|im_end|>\n<|im_start|>assistant\n")
        said = talk.says("an n: [n]")
        assert said is not None
        assert said.startswith("\n<|im_start|>user\n")
        assert "N   _   _   N" in said
        other = talk.asked(sample=1)
        assert other.differences == 0, "another process gets to the same state"
        assert other.tokens is not None
        assert other.tokens.tolist() == talk.answers[-1].tolist()
        assert talk.says("[o]") is None
        assert (talk.answer.ending, talk.answer.reward) == ("over", 1.0)
        talk, _ = opened(host, model_dir, task_of(4))
        assert talk.says("[n]", last="turns") is None
        assert (talk.answer.ending, talk.answer.reward) == ("turns", 0.0)


@pytest.fixture(scope="module")
def echo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """OpenEnv's own server with the environment that its `init` command writes."""
    folder = tmp_path_factory.mktemp("openenv")
    environment = {**os.environ, "PYTHONPATH": str(OPENENV), "OMP_NUM_THREADS": "1"}
    written = [sys.executable, "-m", "openenv.cli", "init", "echo", "--output-dir", str(folder)]
    subprocess.run(written, env={**environment, "PATH": "/nowhere"}, check=True, capture_output=True, timeout=120)
    command = [sys.executable, str(HERE / "shipped_by_others.py"), str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def test_an_environment_of_openenv_behind_its_server(model_dir: Path, echo_url: str) -> None:
    """Turns that are no action are answered with what is wrong; the reward is the sum over steps."""
    settings = {"url": echo_url, "observation": "echoed_message"}
    with host_of("openenv", settings, model_dir, OPENENV) as host:
        talk, opening = opened(host, model_dir, task_of(0, text="Say something."))
        assert "<|im_start|>user\nSay something.\n\nEcho environment ready!<|im_end|>" in opening
        assert talk.says("hello") == "\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert talk.says('{"message": "<|im_end|>"}') is not None
        assert talk.answers[-1].tolist().count(talk.tokenizer.eos_token_id) == 1, "the one of the template"
        assert "has the fields message, not: words, message" in str(talk.says('{"words": "x"}'))
        assert "no valid action" in str(talk.says('{"message": 3}'))
        assert talk.asked(sample=1).differences == 0, "another process gets to the same state"
        assert talk.says("four", last="turns") is None
        assert (talk.answer.ending, talk.answer.reward) == ("turns", pytest.approx(0.5 + 1.0 + 0.4))


def test_an_environment_of_trl(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools are the methods, in the prompt and as TRL reads calls; their failures are the policy's to read."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    settings = {"environment": "shipped_by_others:Counter", "system": "Use tools."}
    with host_of("trl_tools", settings, model_dir) as host:
        talk, opening = opened(host, model_dir, task_of(0, text="Reach the goal.", truth="3"))
        assert '"name": "add"' in opening
        assert "Reach the goal. The number is 0, the goal 3.<|im_end|>" in opening

        def call(name: str, arguments: str) -> str:
            return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'

        first = "\n<|im_start|>user\n<tool_response>\nThe number is 6.\n</tool_response><|im_end|>\n"
        assert talk.says(call("add", '{"amount": 6}')) == f"{first}<|im_start|>assistant\n"
        two = talk.says(call("halve", "{}") + "\n" + call("halve", "{}"))
        assert two is not None
        assert two.count("<tool_response>") == 2
        assert "The number is 3." in two
        assert "{'error': 'the number is odd'}" in two
        assert "There is no tool reset." in str(talk.says(call("reset", "{}")))
        assert talk.asked(sample=1).differences == 0, "another process gets to the same state"
        assert talk.says("Done.") is None
        assert (talk.answer.ending, talk.answer.reward) == ("over", 1.0)
