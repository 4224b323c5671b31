"""Checks of a configuration against this machine, its files, directories and devices, and against the model's sizes.

Only names, sizes and config.json are looked at, which takes milliseconds. `preconditions` opens what is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from megatron_entropic.cluster.open_files import open_files_allowed, open_files_needed, too_few_open_files
from megatron_entropic.config.algorithm import FROZEN_KEYS
from megatron_entropic.config.base import Violation
from megatron_entropic.config.checks import environment_violations, violations
from megatron_entropic.config.load import load_config
from megatron_entropic.config.reward_checks import benchmark_violations, reward_violations
from megatron_entropic.config.run import ITEM_BYTES, Config
from megatron_entropic.errors import missing_model
from megatron_entropic.files.paths import directory_problem, file_problem, new_directory_problem

if TYPE_CHECKING:
    from megatron_entropic.models.dimensions import ModelDimensions

DATA_SUFFIXES = (".parquet", ".jsonl", ".json")
CPU_LATENT_SIZES = (512, 64)
"""kv_lora_rank and qk_rope_head_dim of the published models, the only ones that vLLM 0.32 attends with on a CPU."""

ADDRESSES_PER_MEMORY = 2
"""Multiple of the machine's memory from which on a limit of addresses (ulimit -v) is in nobody's way."""


def load_checked_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Load a configuration (`load_config`) for a run on this machine.

    Raises:
        ConfigError: listing everything that is wrong with the values, and everything that is missing here.
    """

    def checks(config: Config) -> Iterator[Violation]:
        yield from violations(config)
        yield from machine_violations(config)

    return load_config(path, overrides, checks=checks)


def machine_violations(config: Config) -> Iterator[Violation]:
    """Yields what is missing or does not fit on this machine: model directory, data files, output folder, GPUs."""
    for check in (
        _model_directory,
        _frozen_models,
        _data_files,
        _benchmark_files,
        _output_dir,
        _devices,
        _address_space,
        _open_files,
        _installed,
    ):
        yield from check(config)


def evaluation_violations(config: Config) -> Iterator[Violation]:
    """Yields what keeps a configuration without a policy from evaluating, on this machine."""
    for check in (
        reward_violations,
        benchmark_violations,
        environment_violations,
        _model_directory,
        _benchmark_files,
        _output_dir,
        _address_space,
    ):
        yield from check(config)


def _model_directory(config: Config) -> Iterator[Violation]:
    """Yields what is missing in the model's directory, what cannot be trained, and what does not fit its sizes."""
    from megatron_entropic.models.dimensions import read_dimensions

    path, key = config.model.hf_dir, "model.hf_dir"
    if problem := _model_problem(path):
        yield Violation((key,), f"model.hf_dir={problem}")
        return
    yield from _weight_files(config)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        yield Violation((key,), f"model.hf_dir={path}: no tokenizer in it (tokenizer.json, tokenizer_config.json)")
    try:
        dimensions = read_dimensions(path)
    except ValueError as error:
        yield Violation((key,), f"model.hf_dir: {error}")
        return
    policy, rollout = config.policy, config.rollout
    if policy.moe_router_replay != "off" and dimensions.experts is None:
        yield Violation(
            (key, "policy.moe_router_replay"),
            f"policy.moe_router_replay={policy.moe_router_replay} needs a model with experts, and {path} has none",
        )
    if policy.moe_dispatcher != "alltoall" and dimensions.experts is None:
        yield Violation(
            (key, "policy.moe_dispatcher"),
            f"policy.moe_dispatcher={policy.moe_dispatcher} needs a model with experts, and {path} has none",
        )
    latent = dimensions.latent
    if config.cluster.device == "cpu" and latent is not None:
        sizes = (latent.key_value_rank, latent.rotary_head_dim)
        if sizes != CPU_LATENT_SIZES:
            yield Violation(
                (key, "cluster.device"),
                f"cluster.device=cpu: vLLM's kernel for latent attention on a CPU knows kv_lora_rank, qk_rope_head_dim "
                f"= {CPU_LATENT_SIZES} only, the model has {sizes}",
            )
    layout_keys = (
        *(key, "policy.tensor_parallel", "policy.pipeline_parallel"),
        *("policy.first_stage_layers", "policy.last_stage_layers"),
    )
    for problem in dimensions.layout_problems(policy):
        yield Violation(layout_keys, f"policy.{problem}")
    if dimensions.num_attention_heads % rollout.tensor_parallel:
        yield Violation(
            (key, "rollout.tensor_parallel"),
            f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the attention heads "
            f"({dimensions.num_attention_heads})",
        )
    yield from _lengths(config, dimensions)
    yield from _target(config, dimensions)


def _lengths(config: Config, dimensions: ModelDimensions) -> Iterator[Violation]:
    """Yields sequences too long for the model's positions, or for the cache of an engine."""
    whole, prompt = config.max_engine_tokens, config.data.max_prompt_tokens
    response, positions = whole - prompt, dimensions.max_position_embeddings
    name = "rollout" if response == config.rollout.max_response_tokens else "evaluation"
    keys = ("model.hf_dir", "data.max_prompt_tokens", f"{name}.max_response_tokens")
    if whole > positions:
        lower = f"{name}.max_response_tokens to {positions - prompt} or less" if positions > prompt else "both lower"
        yield Violation(
            keys,
            f"data.max_prompt_tokens={prompt} + {name}.max_response_tokens={response} = {whole} tokens, but the "
            f"model's positions end at {positions} (max_position_embeddings): set {lower}",
        )
    elif config.cluster.device == "cpu":
        # On a GPU rollout.gpu_memory_fraction decides, of a memory that is not known here.
        item_bytes = ITEM_BYTES[config.model.dtype]
        token_bytes = dimensions.cached_elements(config.rollout.tensor_parallel) * item_bytes
        needed = whole * token_bytes / 2**30
        if needed > config.rollout.kv_cache_gb:
            yield Violation(
                (*keys, "rollout.kv_cache_gb"),
                f"rollout.kv_cache_gb={config.rollout.kv_cache_gb:g} does not hold one sequence of {whole} tokens, "
                f"which needs {needed:.3g}",
            )


def _target(config: Config, dimensions: ModelDimensions) -> Iterator[Violation]:
    """Yields an entropy target above log V, the most that a distribution over V tokens has."""
    target, most = config.entropy_control.target, math.log(dimensions.vocab_size)
    if config.entropy_control.enabled and isinstance(target, float) and target > most:
        yield Violation(
            ("model.hf_dir", "entropy_control"),
            f"entropy_control.target={target:g} nats: a vocabulary of {dimensions.vocab_size} tokens has at most "
            f"{most:.2f}; 0.7x means 0.7 times the entropy that is measured first",
        )


def _model_problem(path: Path) -> str | None:
    problem = directory_problem(path)
    if problem == "no such directory":
        return missing_model(path)
    return problem and f"{path}: {problem}"


def _weight_files(config: Config) -> Iterator[Violation]:
    """Yields a place without weights where the configuration says they are; they are read when the run starts."""
    path, megatron_dir = config.model.hf_dir, config.model.megatron_dir
    if megatron_dir is not None:
        if not (megatron_dir / ".metadata").is_file():
            yield Violation(
                ("model.megatron_dir",),
                f"model.megatron_dir={megatron_dir}: not a distributed checkpoint, there is no .metadata in it",
            )
    elif not any(path.glob("*.safetensors")):
        hint = ""
        if (path / ".metadata").is_file():
            hint = "; it is a distributed checkpoint: name it as model.megatron_dir too, or convert it to safetensors"
        yield Violation(("model",), f"model.hf_dir={path}: no *.safetensors file in it{hint}")


def _frozen_models(config: Config) -> Iterator[Violation]:
    """Yields frozen models that are not there, or cannot be held on the policy's ranks or score its sequences."""
    from megatron_entropic.models.dimensions import read_dimensions

    try:
        own = read_dimensions(config.model.hf_dir)
    except (ValueError, OSError):
        return  # `_model_directory` says what is wrong with it
    for name, path in config.algorithm.frozen_dirs.items():
        key = FROZEN_KEYS[name]
        if path is None:
            continue
        if problem := _model_problem(path):
            yield Violation((key,), f"{key}={problem}")
            continue
        try:
            dimensions = read_dimensions(path)
        except ValueError as error:
            yield Violation((key,), f"{key}: {error}")
            continue
        for problem in dimensions.layout_problems(config.policy):
            yield Violation((key, "policy"), f"{key}={path} has the policy's layout, and policy.{problem}")
        exactly = name == "teacher" and config.algorithm.distillation.as_loss
        if dimensions.vocab_size < own.vocab_size or (exactly and dimensions.vocab_size != own.vocab_size):
            wanted = "as many, since shards of both vocabularies are compared" if exactly else "at least as many"
            yield Violation(
                (key, "model.hf_dir"),
                f"{key}={path} has {dimensions.vocab_size} token ids, the policy {own.vocab_size}: it needs {wanted}",
            )
        if config.max_sequence_tokens > dimensions.max_position_embeddings:
            yield Violation(
                (key, "data.max_prompt_tokens", "rollout.max_response_tokens"),
                f"{key}={path}: its positions end at {dimensions.max_position_embeddings}, and sequences have up to "
                f"{config.max_sequence_tokens} tokens",
            )


def _data_files(config: Config) -> Iterator[Violation]:
    files = [("data.train_files", path) for path in config.data.train_files]
    if config.warm_start.steps and config.warm_start.file is not None:
        files.append(("warm_start.file", config.warm_start.file))
    if config.data.pass_rates is not None:
        files.append(("data.pass_rates", config.data.pass_rates))
    for key, path in files:
        problem = _data_problem(path)
        if problem:
            yield Violation((key,), f"{key}: {path}: {problem}")


def _benchmark_files(config: Config) -> Iterator[Violation]:
    for name, path in config.evaluation.benchmarks.items():
        problem = _data_problem(path)
        if problem:
            yield Violation(("evaluation.benchmarks",), f"evaluation.benchmarks: {name}: {path}: {problem}")


def _data_problem(path: Path) -> str | None:
    if directory_problem(path) is None and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    if problem := file_problem(path):
        return problem
    if path.suffix not in DATA_SUFFIXES:
        return f"expected one of {', '.join(DATA_SUFFIXES)}, or a directory that datasets' save_to_disk wrote"
    return "the file is empty" if path.stat().st_size == 0 else None


def _output_dir(config: Config) -> Iterator[Violation]:
    path = config.run.output_dir
    if problem := new_directory_problem(path):
        yield Violation(("run.output_dir",), f"run.output_dir={path}: {problem}")


def _devices(config: Config) -> Iterator[Violation]:
    """Yields a lack of GPUs on this machine, where a run of it alone needs one for each rank."""
    # A cluster's GPUs cannot be counted from here.
    if config.cluster.device != "cuda" or config.cluster.address != "local":
        return
    import torch

    engines = 0 if config.cluster.colocate else config.rollout.engines * config.rollout.tensor_parallel
    needed = config.policy.world_size + engines
    present = torch.cuda.device_count()
    if present < needed:
        yield Violation(
            ("cluster", "policy", "rollout"),
            f"cluster.device=cuda: {config.policy.world_size} policy ranks and {needed - config.policy.world_size} "
            f"rollout ranks need {needed} GPUs, this machine has {present}",
        )


# What options of the policy need beside megatron-core: (package, name in it, where it is from).
_TRANSFORMER_ENGINE = (
    "transformer_engine",
    "pytorch.optimizers.FusedAdam",
    "bash tools/environment.sh gpu installs it",
)
_DEEP_EP = "it is built from https://github.com/deepseek-ai/DeepEP for the installed torch"
_PACKAGES = {
    "deepep": ("deep_ep", "Buffer", _DEEP_EP),
    "hybridep": ("deep_ep", "HybridEPBuffer", f"{_DEEP_EP}, from its branch hybrid-ep"),
}


def _installed(config: Config) -> Iterator[Violation]:
    """Yields packages that options of megatron-core need and that are not installed here, or too old."""
    if config.cluster.device == "cpu":
        return  # such options are refused there anyway
    dispatcher, moments = config.policy.moe_dispatcher, config.optimizer.state_dtype
    needed: list[tuple[str, str, tuple[str, str, str]]] = []
    if dispatcher in _PACKAGES:
        needed.append(("policy.moe_dispatcher", dispatcher, _PACKAGES[dispatcher]))
    if moments != "float32":
        needed.append(("optimizer.state_dtype", moments, _TRANSFORMER_ENGINE))
    for key, value, (package, name, source) in needed:
        if problem := _lacks(package, name):
            yield Violation((key,), f"{key}={value} needs {package}, {problem}: {source}, or leave {key} as it was")


def _lacks(package: str, name: str) -> str | None:
    """Words for what keeps `package.name` from being used here; None if nothing does."""
    if importlib.util.find_spec(package) is None:
        return "which is not installed"
    module, _, attribute = f"{package}.{name}".rpartition(".")
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library of CUDA that is not there
        return f"which cannot be imported ({error})"
    return None if hasattr(found, attribute) else f"whose installed version has no {attribute}"


def _address_space(_config: Config) -> Iterator[Violation]:
    """Yields a limit of addresses that is too low for this machine."""
    # Such a limit is met in the middle of a step, and Ray's processes then abort with a stack of their own.
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    memory = psutil.virtual_memory().total
    if limit == resource.RLIM_INFINITY or limit >= ADDRESSES_PER_MEMORY * memory:
        return
    yield Violation(
        ("cluster",),
        f"ulimit -v is {limit / 2**30:.1f} GiB: every process maps Ray's object store, a third of this machine's "
        f"{memory / 2**30:.1f} GiB, beside libraries of several GiB (and with CUDA all memory there is). Raise it with "
        "`ulimit -v unlimited`; what limits memory itself is a control group: systemd-run --scope -p MemoryMax=...",
    )


def _open_files(config: Config) -> Iterator[Violation]:
    """Yields a limit of open files that a run on this machine alone would meet; Ray raises the soft one by itself."""
    allowed, needed = open_files_allowed(), open_files_needed(config)
    if config.cluster.address == "local" and allowed < needed:
        yield Violation(("cluster", "policy", "rollout"), too_few_open_files(allowed, needed))
