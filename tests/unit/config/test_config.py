"""Reading, checking and writing configurations: every problem in one error, and nothing accepted that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_qwen3 import QWEN3

from megatron_entropic.config.load import (
    ConfigError,
    batch_arithmetic,
    config_warnings,
    dump_config,
    key_names,
    load_config,
)
from megatron_entropic.config.run import Config
from megatron_entropic.training.machine import load_checked_config


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model directory and data files, as a run would find them; also the current directory."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN3))
    (model / "model.safetensors").write_bytes(b"\0")
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **sections: Any) -> Path:
    tree = {
        "model": {"hf_dir": "model"},
        "data": {"train_files": ["train.jsonl"], "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 16},
        "entropy_control": {"target": 0.1},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def problems_of(path: Path, *overrides: str, check_machine: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        (load_checked_config if check_machine else load_config)(path, overrides)
    assert all(problem in str(caught.value).replace("\n    ", "\n") for problem in caught.value.violations)
    return caught.value.violations


def test_a_good_configuration_loads_with_absolute_paths(machine: Path) -> None:
    config = load_checked_config(write(machine), ["policy.tensor_parallel=2", "run.output_dir=out"])
    assert config.policy.tensor_parallel == 2
    assert config.model.hf_dir == machine / "model"
    assert config.data.train_files == [machine / "train.jsonl"]
    assert config.run.output_dir == machine / "out"
    assert config.rollout.samples_per_step == 32


def test_overrides_are_yaml_and_the_last_one_wins(machine: Path) -> None:
    config = load_checked_config(
        write(machine),
        [
            "optimizer.learning_rate=3e-4",
            "entropy_control.controller=off",
            "algorithm.dual_clip=null",
            "algorithm.kl.coefficient=0.5",
            "train.steps=3",
            "train.steps=4",
            "data.train_files=train.jsonl",
        ],
    )
    assert config.optimizer.learning_rate == pytest.approx(3e-4)
    assert config.entropy_control.controller == "off"
    assert not config.entropy_control.enabled
    assert config.algorithm.dual_clip is None
    assert config.algorithm.kl.coefficient == 0.5
    assert config.train.steps == 4
    assert config.data.train_files == [machine / "train.jsonl"]


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("rollout.temprature", "rollout.temperature"),
        ("temperature", "reward.judge.temperature or rollout.temperature or evaluation.temperature"),
        ("rolout", "rollout"),
        ("policy.tensor_model_parallel", "policy.tensor_parallel"),
        ("algorithm.learning_rate", "optimizer.learning_rate or warm_start.learning_rate"),
        ("entropy_control.kP", "entropy_control.kp"),
        ("algorithm.kl.coeficient", "algorithm.kl.coefficient"),
    ],
)
def test_an_unknown_key_names_the_nearest(machine: Path, unknown: str, meant: str) -> None:
    assert problems_of(write(machine), f"{unknown}=1") == [f"unknown key {unknown}; did you mean {meant}?"]


def test_a_key_like_no_other_gets_no_suggestion(machine: Path) -> None:
    assert problems_of(write(machine), "zzzzqqqq=1") == ["unknown key zzzzqqqq"]


def test_every_problem_of_every_kind_in_one_error(machine: Path) -> None:
    """Wrong types, unknown keys, bad overrides, impossible combinations and missing files do not hide each other."""
    path = write(
        machine,
        model={"hf_dir": "nowhere", "dtype": "fp16"},
        rollout={"temprature": 0.6, "prompts_per_step": 10, "samples_per_prompt": 1},
        algorithm={"optimizer_steps_per_rollout": 3},
        policy={"sequence_parallel": True, "expert_parallel": "two"},
        warm_start={"steps": 5},
        optimizer={"learning_rate": 1e-6, "min_learning_rate": 1e-3},
        reward={"verifier": "maths"},
    )
    found = problems_of(path, "nonsense", "train.steps=-1", "data.train_files=missing.parquet")
    expected = [
        "override 'nonsense': expected dotted.key=value",
        "model.dtype='fp16': should be 'float32' or 'bfloat16'",
        "unknown key rollout.temprature; did you mean rollout.temperature?",
        "policy.expert_parallel='two': should be a valid integer",
        "warm_start.file is needed when warm_start.steps > 0",
        "train.steps=-1: should be greater than or equal to 0",
        "rollout.prompts_per_step=10 is not divisible by algorithm.optimizer_steps_per_rollout=3",
        "rollout.samples_per_prompt=1: algorithm.advantage=grpo compares",
        "policy.sequence_parallel=true needs policy.tensor_parallel > 1",
        "optimizer.min_learning_rate=0.001 is above optimizer.learning_rate=1e-06",
        "reward.verifier='maths': expected one of countdown, exact, format, ifeval, judge, math, or module:function",
        f"model.hf_dir={machine / 'nowhere'}: no such model directory",
        f"data.train_files: {machine / 'missing.parquet'}: no such file",
    ]
    assert len(found) == len(expected), found
    for message in expected:
        assert any(problem.startswith(message) for problem in found), (message, found)


def test_an_unreadable_value_is_reported_once_and_not_judged_further(machine: Path) -> None:
    assert problems_of(
        write(machine, rollout={"prompts_per_step": "many"}), "algorithm.optimizer_steps_per_rollout=7"
    ) == ["rollout.prompts_per_step='many': should be a valid integer, unable to parse string as an integer (line 11)"]


def test_required_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("reward:\n")
    assert problems_of(path) == ["model.hf_dir is required", "data.train_files is required"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "not valid YAML"),
        ("- a list", "expected sections such as 'model:', found a list"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "key 'train' is given twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in problems_of(path)[0]


def test_strange_keys_are_unknown_keys(machine: Path) -> None:
    path = write(machine)
    path.write_text(path.read_text() + "1: 2\n2024-01-01: {}\nrollout.temperature: 0.6\n")
    assert problems_of(path) == [
        "unknown key 1 (line 13)",
        "unknown key 2024-01-01 (line 14)",
        "unknown key 'rollout.temperature': in a file, sections are nested (only overrides are written with dots) "
        "(line 15)",
    ]


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "no.yaml") == ["no such file"]


def test_a_section_that_is_a_number(machine: Path) -> None:
    assert problems_of(write(machine), "optimizer=5") == ["optimizer=5: is a section, and needs keys of its own"]


def test_parallel_layout_against_the_model(machine: Path) -> None:
    found = problems_of(
        write(machine), "policy.tensor_parallel=3", "policy.pipeline_parallel=3", "rollout.tensor_parallel=3"
    )
    for part in (
        "policy.tensor_parallel=3 does not divide the attention heads (4)",
        "policy.tensor_parallel=3 does not divide the key/value heads (2)",
        "policy.pipeline_parallel=3 does not divide the 4 layers: give",
        "rollout.tensor_parallel=3 does not divide the attention heads (4)",
    ):
        assert any(problem.startswith(part) for problem in found)


@pytest.mark.parametrize(
    ("control", "head", "resolved"),
    [
        ({}, "auto", "fused_loss"),
        ({"denominator": "high_prob_tokens"}, "auto", "recompute"),
        ({"feedback": "microbatch_local"}, "auto", "recompute"),
        ({"controller": "off", "denominator": "high_prob_tokens"}, "auto", "fused_loss"),
        ({"denominator": "high_prob_tokens"}, "logits", "logits"),
        ({}, "recompute", "recompute"),
    ],
)
def test_the_output_head_follows_the_loss(machine: Path, control: dict[str, Any], head: str, resolved: str) -> None:
    config = load_checked_config(write(machine, entropy_control=control, policy={"output_head": head}))
    assert config.output_head == resolved


def test_an_output_head_that_the_loss_does_not_allow(machine: Path) -> None:
    path = write(machine, entropy_control={"denominator": "high_prob_tokens"}, policy={"output_head": "fused_loss"})
    (problem,) = problems_of(path)
    assert problem.startswith("policy.output_head=fused_loss takes each token's gradient in the forward pass, but with")
    assert problem.endswith("use auto or recompute")


def test_eight_bits_need_a_gpu_and_sixteen_bit_parameters(machine: Path) -> None:
    found = problems_of(write(machine, model={"dtype": "float32"}), "policy.fp8=hybrid", "cluster.device=cpu")
    assert found == [
        "policy.fp8=hybrid needs a GPU, but cluster.device is cpu",
        "policy.fp8=hybrid needs model.dtype=bfloat16: what is not computed in 8 bits stays in 16",
    ]


def test_rollouts_in_eight_bits_need_a_gpu_and_are_best_corrected(machine: Path) -> None:
    path = write(machine, rollout={"quantization": "fp8"})
    assert problems_of(path, "cluster.device=cpu", "cluster.check_weights=true") == [
        "rollout.quantization=fp8 needs a GPU, but cluster.device is cpu",
        "cluster.check_weights=true with rollout.quantization=fp8: engines do not hold the weights as they are sent",
    ]
    (warning,) = config_warnings(load_checked_config(path))
    assert "tis is recommended" in warning
    assert config_warnings(load_checked_config(path, ["rollout.importance_correction=tis"])) == []


def test_sharing_devices_has_conditions(machine: Path) -> None:
    shared = ("cluster.colocate=true", "rollout.engines=2", "policy.data_parallel=3")
    found = problems_of(write(machine), *shared, "rollout.tensor_parallel=2", "cluster.policy_ranks_per_node=3")
    assert found == [
        "cluster.colocate=true needs policy.offload=all: engines generate in the memory of the policy",
        "cluster.colocate=true: an engine shares the devices of rollout.tensor_parallel=2 policy ranks, which does not "
        "divide the 3 that there are",
        "cluster.colocate=true: rollout.engines=2 of 2 devices each, but there are 3 policy ranks to share devices "
        "with",
        "cluster.colocate=true fills nodes one after the other; cluster.policy_ranks_per_node must be null",
    ]
    colocated = ["cluster.colocate=true", "policy.offload=all", "policy.data_parallel=2"]
    assert config_warnings(load_checked_config(write(machine), [*colocated, "rollout.tensor_parallel=2"])) == []
    config = load_checked_config(write(machine), colocated)
    assert config_warnings(config) == ["cluster.colocate=true: 1 of 2 devices stand still during rollouts"]
    assert config.cluster.transport_on("cuda") == "ipc"
    assert config.cluster.transport_on("cpu") == "gloo"
    assert Config(model=config.model, data=config.data).cluster.transport_on("cuda") == "nccl"


def test_a_transport_that_is_asked_for_has_conditions(machine: Path) -> None:
    path = write(machine)
    assert problems_of(path, "cluster.transport=ipc") == [
        "cluster.transport=ipc is for GPUs: set cluster.device=cuda, or cluster.transport=auto",
        "cluster.transport=ipc hands memory over within one GPU, which needs cluster.colocate=true: use nccl or gloo",
    ]
    cluster = ("cluster.device=cuda", "cluster.address=10.0.0.1:6379", "cluster.colocate=true", "policy.offload=all")
    assert problems_of(path, *cluster, "cluster.transport=nccl") == [
        "cluster.transport=nccl refuses two processes on one GPU, as cluster.colocate=true has them: use ipc or gloo"
    ]
    assert load_checked_config(path, [*cluster, "cluster.transport=gloo"]).cluster.transport_on("cuda") == "gloo"


def test_router_replay_needs_routers(machine: Path) -> None:
    (problem,) = problems_of(write(machine), "policy.moe_router_replay=score")
    assert problem.startswith("policy.moe_router_replay=score needs a model with experts")
    load_checked_config(write(machine), ["policy.moe_router_replay=off"])


def test_latent_attention_of_engines(machine: Path) -> None:
    published = {
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 64,
        "v_head_dim": 8,
    }
    routing = {"n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    weights = {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    sizes = QWEN3 | published | routing | experts | weights | {"num_key_value_heads": QWEN3["num_attention_heads"]}
    model = sizes | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (machine / "model" / "config.json").write_text(json.dumps(model))
    load_checked_config(write(machine), ["cluster.device=cpu", "cluster.check_weights=true"])
    (machine / "model" / "config.json").write_text(json.dumps(model | {"kv_lora_rank": 256}))
    (problem,) = problems_of(write(machine), "cluster.device=cpu")
    assert "= (512, 64) only, the model has (256, 64)" in problem


def test_lengths_against_the_positions_of_the_model(machine: Path) -> None:
    (problem,) = problems_of(write(machine), "rollout.max_response_tokens=49")
    assert "= 65 tokens, but the model's positions end at 64" in problem
    load_checked_config(write(machine), ["rollout.max_response_tokens=48"])


def test_an_incomplete_model_directory(machine: Path) -> None:
    (machine / "model" / "model.safetensors").unlink()
    (machine / "model" / "tokenizer.json").unlink()
    (machine / "model" / "config.json").write_text(json.dumps(QWEN3 | {"architectures": ["MambaForCausalLM"]}))
    found = problems_of(write(machine))
    assert len(found) == 3
    assert "no *.safetensors" in found[0]
    assert "no tokenizer" in found[1]
    assert "MambaForCausalLM" in found[2]


def test_weights_of_a_distributed_checkpoint(machine: Path) -> None:
    (machine / "model" / "model.safetensors").unlink()
    (machine / "model" / ".metadata").touch()
    assert "name it as model.megatron_dir too" in problems_of(write(machine))[0]
    config = load_checked_config(write(machine), ["model.megatron_dir=model"])
    assert config.model.megatron_dir == config.model.hf_dir
    (problem,) = problems_of(write(machine), "model.megatron_dir=nowhere")
    assert (
        problem
        == f"model.megatron_dir={machine / 'nowhere'}: not a distributed checkpoint, there is no .metadata in it"
    )


def test_data_files(machine: Path) -> None:
    (machine / "empty.jsonl").touch()
    (machine / "table.csv").write_text("a,b")
    found = problems_of(
        write(machine),
        "data.train_files=[empty.jsonl, table.csv]",
        "warm_start.steps=1",
        "warm_start.file=warm.parquet",
    )
    assert [problem.rpartition("/")[2] for problem in found] == [
        "empty.jsonl: the file is empty",
        "table.csv: expected one of .parquet, .jsonl, .json, or a directory that datasets' save_to_disk wrote",
        "warm.parquet: no such file",
    ]


def test_an_output_directory_below_a_file(machine: Path) -> None:
    (problem,) = problems_of(write(machine), "run.output_dir=train.jsonl/run")
    assert "is a file, not a directory" in problem


def test_replicas_without_work(machine: Path) -> None:
    (problem,) = problems_of(write(machine), "policy.data_parallel=33")
    assert "policy.data_parallel=33 is more than the 32 responses" in problem


def test_gpus_are_counted_for_a_run_of_this_machine(machine: Path) -> None:
    path = write(machine)
    (problem,) = problems_of(path, "cluster.device=cuda", "policy.data_parallel=32", "rollout.engines=32")
    assert "32 policy ranks and 32 rollout ranks need 64 GPUs" in problem
    load_checked_config(path, ["cluster.device=cuda", "policy.data_parallel=32", "cluster.address=auto"])


def test_a_configuration_for_another_machine(tmp_path: Path) -> None:
    path = write(tmp_path, model={"hf_dir": "/somewhere/else"})
    load_config(path)
    assert len(problems_of(path)) == 2


def test_what_is_written_reads_back_equal(machine: Path) -> None:
    config = load_checked_config(
        write(machine), ["entropy_control.controller=off", "logging.wandb=off", "algorithm.kl.coefficient=1e-3"]
    )
    dump_config(config, machine / "out" / "config.yaml")
    assert load_checked_config(machine / "out" / "config.yaml") == config


def test_batch_arithmetic_of_the_published_setting(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        data={"max_prompt_tokens": 1024},
        rollout={
            "prompts_per_step": 512,
            "samples_per_prompt": 8,
            "max_response_tokens": 8192,
            "temperature": 0.6,
            "engines": 4,
        },
        policy={"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 4, "tokens_per_microbatch": 18432},
        warm_start={"steps": 2, "file": "pairs.jsonl", "sequences_per_step": 8},
    )
    rows = dict(batch_arithmetic(load_config(path, ["algorithm.optimizer_steps_per_rollout=2"])))
    assert rows == {
        "responses per step": "512 prompts x 8 = 4,096",
        "optimizer steps": "2,000 steps x 2 = 4,000",
        "responses per optimizer step": "4,096 / 2 = 2,048, about 512 per data-parallel replica",
        "longest sequence": "1,024 prompt + 8,192 response = 9,216 tokens",
        "response tokens per step": "at most 33,554,432",
        "micro-batch": "18,432 packed tokens, at most 256 of them per optimizer step",
        "output head": "fused_loss (policy.output_head=auto)",
        "policy ranks": "2 tensor x 2 pipeline x 4 data = 16",
        "rollout ranks": "4 engine(s) x 1 tensor = 4",
        "warm start": "2 steps x 8 = 16 pairs",
        "policy loss": "clipped, advantage grpo",
        "entropy control": "PI at 0.1 nats (T = 0.6), K_p 1, K_i 0.01, H from previous step",
    }


def test_warnings_speak_only_when_something_is_odd(machine: Path) -> None:
    assert config_warnings(load_checked_config(write(machine))) == []
    odd = load_checked_config(
        write(machine),
        [
            "policy.tokens_per_microbatch=8",
            "rollout.top_p=0.9",
            "reward.workers=0",
            "entropy_control={target: 0.1, kp: 0, ki: 0}",
        ],
    )
    assert len(config_warnings(odd)) == 4


def test_a_schedule_that_ends_early_is_noticed(machine: Path) -> None:
    moving = ["train.steps=200", "entropy_control.target_schedule={kind: linear, end: 0.2, steps: 200}"]
    assert config_warnings(load_checked_config(write(machine), moving)) == []
    four = [*moving, "algorithm.optimizer_steps_per_rollout=4", "entropy_control.feedback=auto"]
    config = load_checked_config(write(machine), four)
    (warning,) = config_warnings(config)
    assert "it ends with step 50 of 200; for the whole run take 800" in warning
    assert "200 optimizer steps: until step 50)" in dict(batch_arithmetic(config))["entropy control"]
    whole = load_checked_config(write(machine), [*four, "entropy_control.target_schedule.steps=800"])
    assert config_warnings(whole) == []


def test_key_names_cover_the_tree() -> None:
    names = list(key_names())
    assert {"run", "algorithm.kl.estimator", "rollout.temperature", "cluster.publish_timeout_s"} <= set(names)
    assert len(names) == len(set(names))
    assert "algorithm.kl" in names
    assert set(Config.model_fields) == {name for name in names if "." not in name}


def test_losses_and_controllers_that_cannot_work_are_named_together(machine: Path) -> None:
    problems = problems_of(
        write(machine),
        "algorithm.policy_loss=gsop",
        "algorithm.loss_options.steer_weight_min=2",
        "entropy_control.controller=aec",
        "entropy_control.feedback=microbatch_local",
        "entropy_control.gain_schedule.kind=linear",
    )
    assert len(problems) == 4
    assert any("did you mean gspo?" in problem for problem in problems)
    assert any("steer_weight_min=2 is above" in problem for problem in problems)
    assert any("aec has not" in problem for problem in problems)
    assert any("fixed target in nats" in problem for problem in problems)


def test_the_output_head_follows_the_policy_loss(machine: Path) -> None:
    def head(*overrides: str) -> str:
        return load_checked_config(write(machine), overrides).output_head

    assert head() == "fused_loss"
    assert head("algorithm.policy_loss=clip_cov") == "fused_loss"
    assert head("entropy_control.controller=aec", "entropy_control.denominator=high_prob_tokens") == "fused_loss"
    assert head("algorithm.policy_loss=gspo") == "recompute"
    assert head("algorithm.policy_loss=mine:loss") == "recompute"
    assert any("fused_loss" in p for p in problems_of(
        write(machine), "algorithm.policy_loss=gspo", "policy.output_head=fused_loss"
    ))  # fmt: skip


def test_feedback_follows_what_was_scored(machine: Path) -> None:
    def feedback(*overrides: str) -> str:
        return load_checked_config(write(machine), overrides).feedback

    assert feedback() == "score_pass"
    assert feedback("algorithm.epochs_per_rollout=2") == "previous_step"
    assert feedback("algorithm.epochs_per_rollout=2", "algorithm.proximal_logprobs=each_epoch") == "score_pass"
    assert feedback("algorithm.optimizer_steps_per_rollout=2") == "previous_step"


def test_deltas_need_gloo(machine: Path) -> None:
    asked = ("rollout.publish=delta", "cluster.device=cuda", "cluster.address=10.0.0.1:6379")
    path = write(machine)
    assert problems_of(path, *asked) == [
        "rollout.publish=delta does not go over the transport here, nccl: use full or cluster.transport=gloo"
    ]
    assert load_checked_config(path, [*asked, "cluster.transport=gloo"]).rollout.publish == "delta"
