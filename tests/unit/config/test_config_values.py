"""What a person types for a key: text stays text, numbers are numbers, and nonsense is named with its key and line."""

from __future__ import annotations

import json
import os
import resource
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_config import QWEN3

from megatron_entropic.config.load import ConfigError, key_names, read_config
from megatron_entropic.training.machine import load_checked_config

FILE = """model:
  hf_dir: model
data:
  train_files: train.jsonl
  max_prompt_tokens: 16
rollout: {prompts_per_step: 8, samples_per_prompt: 4, max_response_tokens: 16}
entropy_control: {target: 0.1}
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (tmp_path / "run.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def value_of(key: str, *overrides: str) -> Any:
    value: Any = load_checked_config("run.yaml", overrides)
    for part in key.split("."):
        value = getattr(value, part)
    return value


TEXTS = [
    *("try #2", " Answer:", "010", "1e5", "12:30", "2024-01-01", "on", "no", "null", "~", "", "a: b", "lr=1e-6"),
    *("[x]", "{[0-9]}", "- be brief\n- be right", "&ref", "*x", "!tag", "@you", "%done", "`x`", "50%@home&co", "\\n"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_keys_take_text(machine: Path, text: str) -> None:
    assert value_of("data.prompt_suffix", f"data.prompt_suffix={text}") == text


@pytest.mark.parametrize(
    "text", [text for text in TEXTS if text.strip() and text[0] not in "&*!@%`[{- " and "\n" not in text]
)
def test_text_keys_take_text_in_a_file_too(machine: Path, text: str) -> None:
    """What YAML itself cuts off or gives a meaning of its own needs quotes."""
    plain = text if not any(mark in text for mark in (" #", ": ")) else json.dumps(text)
    (machine / "run.yaml").write_text(FILE + f"run:\n  name: {plain}\n")
    assert value_of("run.name") == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.system_prompt=null", None),
        ('data.system_prompt="null"', "null"),
        ("data.system_prompt='it''s'", "it's"),
        ('data.system_prompt="a" or "b"', '"a" or "b"'),
        ('data.prompt_suffix="\\n\\nThink."', "\n\nThink."),
        ("optimizer.learning_rate=1e-6", 1e-6),
        ("train.steps=1e3", 1000),
        ("train.steps=1_000", 1000),
        ("train.steps=010", 10),
        ('train.steps="32"', 32),
        ("algorithm.dual_clip=off", None),
        ("algorithm.dual_clip=none", None),
        ("rollout.enforce_eager=off", False),
        ("rollout.enforce_eager=null", None),
        ("entropy_control.controller=off", "off"),
        ("entropy_control.target=0.7x", "0.7x"),
        ("train.record_steps=3", [3]),
        ("train.record_steps=[3, 5]", [3, 5]),
        ("cluster.nodes=[0012,0013]", ["0012", "0013"]),
        ("evaluation.samples_of={on: 1}", {"on": 1}),
    ],
)
def test_values_of_other_keys(machine: Path, override: str, value: Any) -> None:
    benchmark = ["evaluation.benchmarks={on: train.jsonl}"]
    assert value_of(override.partition("=")[0], *benchmark, override) == value


MALFORMED = [
    *("rollout.temperature=.inf", "rollout.temperature=.nan", "rollout.temperature=1e-300", "rollout.temperature=0"),
    *("optimizer.learning_rate=.inf", "optimizer.learning_rate=1e400", "optimizer.learning_rate=50"),
    *(
        "entropy_control.target=",
        "entropy_control.target=.inf",
        "entropy_control.target=nanx",
        "entropy_control.target=-1x",
    ),
    *(
        "entropy_control.target=99",
        "entropy_control.kp=.inf",
        "entropy_control.ki=1e30",
        "entropy_control.dead_band=.nan",
    ),
    *("reward.added={format: .nan}", "reward.added={format: 1e30}", "reward.added=[1]", "reward.timeout_s=.inf"),
    *("reward.workers=100000", "reward.format_pattern=(", "reward.verifier=", "reward.memory_limit_gb=0"),
    *("rollout.importance_cap=.inf", "rollout.engines=1000000", "rollout.engines=-1", "rollout.kv_cache_gb=.nan"),
    *("rollout.prompts_per_step=99999999999999999999", "rollout.prompts_per_step=1.5", "rollout.prompts_per_step=true"),
    *("rollout.top_k=1e1", "rollout.top_k={a: 1}", "rollout.top_k=0x10", "rollout.max_response_tokens=49"),
    *(
        "train.steps=1e30",
        "train.steps=many",
        "train.steps=",
        "train.steps=1.5e0",
        "train.steps.x=5",
        "train.record_steps=[[1]]",
    ),
    *(
        "train.record_steps=[1, x]",
        "train.record_steps={a: 1}",
        "train.record_steps=[1",
        "train=5",
        "train=[1]",
        "train",
    ),
    *(
        "run.seed=99999999999999999999999",
        "run.seed=.nan",
        "run.seed=2024-01-01",
        "run.name=a\0b",
        "run.name=\x1b[31mred",
    ),
    *(
        "run.name=\ud800",
        "run.name=" + "x" * 200,
        "run.output_dir=var/a\0b",
        "run.output_dir=/proc/x",
        "run.output_dir=",
    ),
    *("run.output_dir=" + "y" * 300, "run.output_dir=train.jsonl/x", "data.train_files=", "data.train_files=[]"),
    *(
        "data.train_files=/dev/null",
        "data.train_files=pipe.jsonl",
        "data.train_files=socket.jsonl",
        "data.train_files=loop.jsonl",
    ),
    *(
        "data.train_files=model",
        "data.train_files=dangling.jsonl",
        "data.train_files=train.jsonl/x",
        "data.prompt_key=",
    ),
    *("data.max_prompt_tokens=1e9", "data.file_weights=[.nan]", "data.system_prompt=\udcff", "model.hf_dir=loop.jsonl"),
    *(
        "model.hf_dir=train.jsonl",
        "model.hf_dir=",
        "model.dtype=float8",
        "algorithm.dual_clip=.nan",
        "algorithm.clip_low=x",
    ),
    *("cluster.address=foo:bar", "cluster.address=1.2.3.4:99999999", "cluster.address=", "cluster.nodes=n1,n2"),
    *("cluster.generate_timeout_s=.inf", "cluster.generate_timeout_s=1e300", "policy.distributed_timeout_s=-1"),
    *("policy.tensor_parallel=100000", "checkpoint.asynchronous=maybe", "evaluation.benchmarks={a/b: train.jsonl}"),
    *(
        "evaluation.benchmarks={x: [1]}",
        "evaluation.benchmarks={[a]: b}",
        "evaluation.benchmarks=[1]",
        "a.b.c=1",
        "=1",
        "..=1",
    ),
]


@pytest.mark.parametrize("override", MALFORMED, ids=ascii)
def test_a_value_that_cannot_work_is_refused_by_name(machine: Path, override: str) -> None:
    os.mkfifo("pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jsonl")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    Path("dangling.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(ConfigError) as caught:
        load_checked_config("run.yaml", [override])
    key = override.partition("=")[0]
    name = {"a.b.c": "unknown key a", "": "override", "..": "override", "train.steps.x": "train.steps"}.get(key, key)
    assert all(name in problem for problem in caught.value.violations), caught.value
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "key 'train.steps' is given twice (lines 9 and 10)"),
        ("? [a, b]\n: 1\n", "line 8: a key is a text, this is a list"),
        ("{a: 1}: 2\n", "line 8: a key is a text, this is a mapping"),
        ("a: " + "[" * 3000 + "]" * 3000, "line 8: nested more than 30 levels deep"),
        ("run: &r\n  name: *r\n", "run.name: needs a single value, this is a mapping (line 9)"),
        ("run:\n  name: *x\n", "line 9, column 9: found undefined alias 'x'"),
        ("run:\n  name: &ref\n", "run.name: a text that begins with &, * or ! needs quotes in YAML (line 9)"),
        ("run:\n  name: !important\n", "run.name: a text that begins with &, * or ! needs quotes in YAML (line 9)"),
        ("run:\n  name: !!python/object/apply:os.system [x]\n", "run.name: needs a single value, this is a list"),
        ("run:\n\tname: x\n", "line 9, column 1: found character '\\t'"),
        ("run:\n  name:\n", "run.name is empty: should be a valid string (line 9)"),
        ('run:\n  name: "a\\0b"\n', "run.name: 'a\\x00b' holds a character that cannot be printed (line 9)"),
        ('run:\n  name: "\\ud800"\n', "run.name='\\ud800': not valid Unicode, there is half a character"),
        ("run:\n  seed: {a: 1}\n", "run.seed: needs a single value, this is a mapping (line 9)"),
        ("run: [1]\n", "run: needs keys of its own, this is a list (line 8)"),
        ("run:\n  name: a\x00b\n", "line 9: the character U+0000 cannot stand in YAML"),
        ("---\nrun: {}\n", "line 8, column 1: but found another document"),
        ("train:\n  <<: {steps: 1}\n", "unknown key train.<<"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_told_with_line_and_key(machine: Path, text: str, expected: str) -> None:
    (machine / "run.yaml").write_text(FILE + text)
    with pytest.raises(ConfigError) as caught:
        load_checked_config("run.yaml")
    assert any(expected in problem for problem in caught.value.violations), caught.value


def test_a_bomb_of_aliases_does_not_go_off(machine: Path) -> None:
    levels = [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(levels) + "\nrun: {name: *i}\n"
    (machine / "run.yaml").write_text(bomb + FILE)
    with pytest.raises(ConfigError, match=r"run\.name: needs a single value, this is a list"):
        load_checked_config("run.yaml")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "is a directory, not a file"),
        (os.mkfifo, "is a pipe, not a file"),
        (lambda path: path.symlink_to(path), "is a link that leads back to itself"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
        (lambda path: path.write_bytes(FILE.encode("utf-16")), "line 1: not UTF-8"),
        (lambda path: path.write_bytes(b"a: 1\nb: caf\xe9\n"), "line 2: not UTF-8 (byte 0xe9)"),
        (lambda path: path.write_text("#" * (2 << 20)), "this is no configuration"),
    ],
)
def test_a_configuration_that_is_no_file_is_called_what_it_is(tmp_path: Path, make: Any, expected: str) -> None:
    make(tmp_path / "run.yaml")
    with pytest.raises(ConfigError) as caught:
        load_checked_config(tmp_path / "run.yaml")
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", ["", "[1]", "{a: 1}", "{[0-9]}", ".nan", "\0", "-1e30"])
def test_values_of_another_kind_crash_no_key(machine: Path, value: str) -> None:
    keys = list(key_names())
    single = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    read_config("run.yaml", [f"{key}={value}" for key in single])
    for section in set(keys) - set(single):
        read_config("run.yaml", [f"{section}={value}"])


@pytest.mark.usefixtures("machine")
def test_a_limit_of_addresses_is_refused_before_ray_s_processes_abort_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `ulimit -v` of 3 GB a run ended with "terminate called", with 10 GB in step 1 with the stack of a raylet."""
    memory = psutil.virtual_memory().total
    for limit, refused in (
        (10 << 30, True),
        (2 * memory - 1, True),
        (2 * memory, False),
        (resource.RLIM_INFINITY, False),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        if refused:
            with pytest.raises(ConfigError, match=r"ulimit -v is .* GiB: .*`ulimit -v unlimited`"):
                load_checked_config("run.yaml", [])
        else:
            load_checked_config("run.yaml", [])
