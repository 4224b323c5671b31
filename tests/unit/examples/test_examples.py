"""The examples' files: what prepare.py generates is what the trainer reads, and the configurations can run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from modules import load_module

from megatron_entropic.config.load import load_config
from megatron_entropic.config.run import Config
from megatron_entropic.data import TaskDataset, WarmStartPairs, load_tokenizer
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.rewards import build_verifier
from megatron_entropic.training.machine import load_checked_config

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


prepare = load_module(EXAMPLES / "countdown/prepare.py", "countdown_prepare")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("countdown")
    assert prepare.prepare(folder, seed=3, sizes=prepare.Sizes(train=300, heldout=40, warm_start=500))
    return folder


def countdown_config(assets: Path, *overrides: str) -> Config:
    """The shipped configuration, with the generated files in place of the ones quickstart.sh makes."""
    return load_checked_config(
        EXAMPLES / "countdown_cpu.yaml",
        [
            f"model.hf_dir={assets}/model",
            f"data.train_files=[{assets}/train.parquet]",
            f"warm_start.file={assets}/warm_start.parquet",
            f"run.output_dir={assets}/run",
            *overrides,
        ],
    )


def test_a_second_call_writes_nothing(assets: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in assets.rglob("*") if path.is_file()}
    assert not prepare.prepare(assets, seed=3, sizes=prepare.Sizes(train=300, heldout=40, warm_start=500))
    assert before == {path: path.stat().st_mtime_ns for path in assets.rglob("*") if path.is_file()}


def test_files_are_a_function_of_the_seed(assets: Path, tmp_path: Path) -> None:
    sizes = prepare.Sizes(train=300, heldout=40, warm_start=500)
    for seed, same in ((3, True), (4, False)):
        other = tmp_path / str(seed)
        assert prepare.prepare(other, seed=seed, sizes=sizes)
        for name in ("train.parquet", "heldout.parquet", "warm_start.parquet", "model/model.safetensors"):
            assert ((assets / name).read_bytes() == (other / name).read_bytes()) is same, name


def test_an_interrupted_call_is_repeated(assets: Path, tmp_path: Path) -> None:
    sizes = prepare.Sizes(train=10, heldout=5, warm_start=10)
    assert prepare.prepare(tmp_path, sizes=sizes)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train.parquet").write_bytes(b"half")
    assert prepare.prepare(tmp_path, sizes=sizes)
    assert pyarrow.parquet.read_table(tmp_path / "train.parquet").num_rows == 10


def test_the_trainer_reads_every_prompt(assets: Path) -> None:
    config = countdown_config(assets)
    tokenizer = load_tokenizer(config.model.hf_dir)
    prompts = TaskDataset(config.data, tokenizer, seed=1)
    assert len(prompts) == 300
    verifier = build_verifier("countdown")
    for prompt in (prompts[position] for position in range(len(prompts))):
        assert re.fullmatch(r"\d,\d,\d>\d\d:", prompt.text)
        assert tokenizer.decode(prompt.tokens) == prompt.text
        truth = json.loads(prompt.ground_truth)
        assert [int(digit) for digit in prompt.text[:5:2]] == truth["numbers"]
        assert int(prompt.text[6:8]) == truth["target"]
        assert verifier(prompt.text, prompt.ground_truth, prompt.extra_info) == 0.0


def test_every_warm_start_response_is_right_and_fits(assets: Path) -> None:
    config = countdown_config(assets)
    assert config.warm_start.file is not None
    tokenizer = load_tokenizer(config.model.hf_dir)
    pairs = WarmStartPairs(config.warm_start.file, tokenizer, config.max_sequence_tokens)
    rows = pyarrow.parquet.read_table(config.warm_start.file).to_pylist()
    verifier = build_verifier("countdown")
    assert len(pairs) == 500
    for index, row in enumerate(rows):
        numbers, target = row["prompt"].rstrip(":").split(">")
        truth = {"numbers": [int(number) for number in numbers.split(",")], "target": int(target)}
        assert verifier(row["response"], truth, {}) == 1.0, row
        prompt, response = pairs[index]
        assert len(prompt) <= config.data.max_prompt_tokens
        assert len(response) == config.rollout.max_response_tokens
        assert response[-1] == tokenizer.eos_token_id


def test_held_out_problems_are_nowhere_else(assets: Path) -> None:
    def identities(name: str) -> set[tuple[tuple[str, ...], str]]:
        found = set()
        for row in pyarrow.parquet.read_table(assets / name).to_pylist():
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
            numbers, target = prompt.split(">")
            found.add((tuple(sorted(numbers.split(","))), target))
        return found

    heldout = identities("heldout.parquet")
    assert len(heldout) == 40
    assert not heldout & (identities("train.parquet") | identities("warm_start.parquet"))


def test_the_model_is_a_qwen3_that_exercises_padding_and_groups(assets: Path) -> None:
    from transformers import AutoModelForCausalLM

    dimensions = read_dimensions(assets / "model")
    config = countdown_config(assets)
    assert dimensions.family == "qwen3"
    assert dimensions.vocab_size % config.policy.tensor_parallel != 0
    assert dimensions.num_query_groups < dimensions.num_attention_heads
    assert dimensions.tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(assets / "model")
    tokenizer = load_tokenizer(assets / "model")
    logits = model(**tokenizer("3,7,5>26:", return_tensors="pt")).logits
    assert logits.shape == (1, 9, dimensions.vocab_size)
    assert torch.isfinite(logits).all()


def test_the_only_special_token_is_the_end(assets: Path) -> None:
    """A special token is invisible to the verifier: a second one would be a way to write right answers differently."""
    tokenizer = load_tokenizer(assets / "model")
    ids = list(range(len(tokenizer)))
    assert tokenizer.decode(ids, skip_special_tokens=True) == prepare.VOCABULARY.replace(prepare.END, "")


@pytest.mark.parametrize(
    ("operands", "operators", "value"),
    [
        ([3, 7, 5], ["*", "+"], 26),
        ([3, 7, 5], ["+", "*"], 38),
        ([9, 8, 7], ["-", "-"], -6),
        ([2, 3, 4], ["*", "*"], 24),
    ],
)
def test_value_of(operands: list[int], operators: list[str], value: int) -> None:
    assert prepare.value_of(operands, operators) == value


def test_countdown_configuration(assets: Path) -> None:
    config = countdown_config(assets)
    assert config.policy.tensor_parallel == 2
    assert config.rollout.samples_per_step == 256
    assert config.entropy_control.enabled
    assert config.feedback == "score_pass"
    assert not countdown_config(assets, "entropy_control.controller=off").entropy_control.enabled


def test_qwen3_8b_configuration_is_the_published_setting() -> None:
    config = load_config(EXAMPLES / "qwen3_8b.yaml")
    rollout, control, optimizer = config.rollout, config.entropy_control, config.optimizer
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.temperature) == (512, 8, 0.6)
    assert (config.data.max_prompt_tokens, rollout.max_response_tokens) == (1024, 8192)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_clip) == (1e-6, 0.01, 1.0)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (control.controller, control.target, control.kp, control.ki, control.tau) == ("pi", 0.1, 1.0, 0.01, 0.95)
    assert (config.algorithm.clip_low, config.algorithm.clip_high, config.algorithm.dual_clip) == (0.2, 0.2, 3.0)
    assert config.algorithm.aggregation == "token-mean"
    assert config.algorithm.kl.coefficient == 0
    assert config.policy.world_size == 8
    assert rollout.engines * rollout.tensor_parallel == 8


def differences(first: str, second: str) -> dict[str, Any]:
    """What a recipe has otherwise than another, names aside: {dotted key: value in the second}."""
    configs = [load_config(EXAMPLES / f"{name}.yaml") for name in (first, second)]
    left, right = (dict(flat(config.model_dump(mode="json"))) for config in configs)
    return {key: right[key] for key in right if left[key] != right[key] and not key.startswith("run.")}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_recipes_of_the_paper_differ_in_what_its_tables_compare() -> None:
    grpo = differences("qwen3_8b", "qwen3_8b_grpo")
    assert grpo.pop("entropy_control.controller") == "off"
    assert all(key.startswith("entropy_control.") for key in grpo), "with no controller nothing else of it matters"
    assert differences("qwen3_8b", "qwen3_8b_offpolicy") == {
        "algorithm.optimizer_steps_per_rollout": 4,
        "entropy_control.feedback": "previous_step",
    }
    serving = ("rollout.engines", "rollout.gpu_memory_fraction", "rollout.max_concurrent_sequences")
    machine = ("policy.", "cluster.", *serving)
    shared = differences("qwen3_8b", "qwen3_8b_colocated")
    assert (shared["cluster.colocate"], shared["policy.offload"]) == (True, "all")
    assert all(key.startswith(machine) for key in shared), shared
    small = differences("qwen3_8b", "nemotron_1_5b")
    assert all(key.startswith(("model.", *machine)) for key in small), small


RECIPES = ["qwen3_8b", "qwen3_8b_colocated", "qwen3_8b_grpo", "qwen3_8b_offpolicy", "nemotron_1_5b"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_has_a_source(name: str) -> None:
    lines = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    section = ""
    for line in lines:
        section = line.partition(":")[0] if line and not line.startswith((" ", "#")) else section
        if section in ("rollout", "algorithm", "entropy_control", "optimizer") and re.search(r": [\d.]", line):
            assert "#" in line, line


def test_the_rows_of_the_paper_are_configurations_that_can_run() -> None:
    """Recipe and overrides of every row in docs/reproducing_the_paper.md."""
    page = (EXAMPLES.parent / "docs/reproducing_the_paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(examples/\S+\.yaml)((?: [\w.]+=\S+)+)` \|", page)
    assert len(rows) == 6
    for recipe, overrides in rows:
        load_config(EXAMPLES.parent / recipe, overrides.split())


def test_the_arms_of_the_two_phases_are_configurations_that_can_run() -> None:
    """Overrides of every arm in the head of the file, in both phases."""
    path = EXAMPLES / "two_phase_qwen3_1_7b.yaml"
    arms = re.findall(
        r"^#   (\w+) +((?:entropy_control\.\S+ ?)+|\(nothing: this file\))$", path.read_text(), re.MULTILINE
    )
    assert [name for name, _ in arms] == ["grpo", "constant", "pi", "constant_ceiling", "unsolved_ceiling"]
    seen = set()
    for _, overrides in arms:
        own = [word for word in overrides.split() if "=" in word]
        config = load_config(path, own)
        load_config(path, [*own, "data.train_files=data/dapo_math_hard.parquet", "train.steps=600"])
        seen.add((config.entropy_control.controller, config.entropy_control.guard))
    assert len(seen) == 5
