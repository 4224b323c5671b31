"""The typed tree of every knob. Units are in the names; one name for one thing everywhere.

Only shape and type live here, with the checks that need a single section. `load` reads YAML and
dotted overrides into this tree and refuses combinations that cannot work, all violations in one error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_entropic.config.algorithm import AlgorithmConfig, EntropyControlConfig, FrozenName
from megatron_entropic.config.base import LARGEST, Count, Ranks, Seconds, Section, off_is_a_word, one_line
from megatron_entropic.config.data import DataConfig, EnvironmentConfig, RewardConfig
from megatron_entropic.config.names import POLICY_LOSSES, transports_for
from megatron_entropic.config.policy import PolicyConfig

Dtype = Literal["float32", "bfloat16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of a value of each `Dtype`."""
Device = Literal["cpu", "cuda"]
PublishMode = Literal["full", "delta"]


def _ray_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if value not in ("local", "auto") and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"expected local, auto, or host:port with a port up to 65535, not {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings by which a response is drawn. Temperature 0 takes the most probable token each time."""

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int


class RunConfig(Section):
    """Identity of a run and where its files go."""

    name: Annotated[str, AfterValidator(one_line)] = Field("run", max_length=128)
    output_dir: Path = Field(Path("runs/run"), description="Everything a run writes lies below this folder.")
    seed: int = Field(1, ge=0, le=LARGEST)
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: continue from the newest complete checkpoint in output_dir; never: refuse if one exists.",
    )


class ModelConfig(Section):
    """The policy's starting point, a Hugging Face directory (config.json, safetensors, tokenizer)."""

    hf_dir: Path
    megatron_dir: Path | None = Field(
        None,
        description="A distributed checkpoint (torch_dist) whose weights are taken instead: a conversion, a checkpoint "
        "of another run or of Megatron-LM's training script. Configuration and tokenizer come from hf_dir, which for a "
        "conversion may be the same directory.",
    )
    dtype: Dtype = Field("bfloat16", description="Parameter and activation dtype of policy and engines.")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-6, gt=0, le=1)
    min_learning_rate: float = Field(0.0, ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Not applied to norms and biases.")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, le=1)
    gradient_clip: float = Field(1.0, ge=0, description="Global norm; 0 switches clipping off.")
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Dtype of Adam's moments. bfloat16: megatron-core's precision-aware optimizer, on GPUs with "
        "Transformer Engine: 8 bytes of state for a parameter instead of 12. With policy.distributed_optimizer and "
        "model.dtype=bfloat16 only.",
    )


class RolloutConfig(Section):
    """Sampling from vLLM engines."""

    engines: Ranks = 1
    tensor_parallel: Ranks = Field(1, description="vLLM tensor parallel size of each engine.")
    prompts_per_step: Count = Field(512, ge=1)
    samples_per_prompt: Count = Field(8, ge=1)
    lag: int = Field(
        0,
        ge=0,
        le=64,
        description="Weight versions by which a token may be older than the policy that learns from it. 0: engines "
        "wait while the policy learns. L: they work on the L steps after it meanwhile; see docs/asynchronous.md.",
    )
    split_staleness: bool = Field(
        True,
        description="With lag: the policy computes log-probs of tokens with the weights that sampled them too, from a "
        "copy in host memory. staleness/* and mismatch/* are then apart, each can be corrected by itself, and the "
        "entropy that drives alpha is weighted to the current policy's states. Costs a second pass over old tokens.",
    )
    staleness_correction: Literal["none", "tis", "mis"] = Field(
        "none",
        description="With split_staleness: weight of the policy loss from w = pi_old / pi_v, v being the version that "
        "sampled a token; importance_correction is then that of pi_v / pi_rollout. Methods and cap as there.",
    )
    schedule_of: Path | None = Field(
        None,
        description="Directory of a run with lag whose recorded schedule is followed, so that its tokens come again.",
    )
    max_resamples: int = Field(
        0,
        ge=0,
        lt=1000,
        description="DAPO's dynamic sampling: replace groups all right or all wrong, so often a step at most.",
    )
    max_response_tokens: Count = Field(8192, ge=1)
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="Of training's samples. vLLM takes what is below 0.01 for 0.01."
    )
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    max_concurrent_sequences: Count = Field(256, ge=1, description="vLLM max_num_seqs per engine.")
    kv_cache_gb: float = Field(1.0, gt=0, description="KV cache on CPU; on GPU gpu_memory_fraction decides.")
    gpu_memory_fraction: float = Field(0.85, gt=0, lt=1)
    enforce_eager: bool | None = Field(None, description="None: eager on CPU, compiled with CUDA graphs on GPU.")
    quantization: Annotated[Literal["off", "fp8"], BeforeValidator(off_is_a_word)] = Field(
        "off",
        description="fp8: engines round what they are sent to 8 bits, on GPUs that can multiply them. They sample from "
        "another distribution than the policy's: use importance_correction=tis and watch mismatch/*.",
    )
    publish: PublishMode = Field(
        "full",
        description="How new weights reach the engines. full: all of them. delta: only elements whose bits changed, "
        "over gloo; both ends keep a copy of the weights. Worth it in bfloat16 at small learning rates.",
    )
    importance_correction: Literal["none", "tis", "mis"] = Field(
        "none",
        description="Weight of the policy loss, from w = pi_old / pi_rollout. tis: min(w, importance_cap). "
        "mis: w inside [1 / importance_cap, importance_cap], else 0.",
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: w is the product over the response, the same for each of its tokens."
    )
    importance_cap: float = Field(2.0, gt=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Texts, each one token of the tokenizer, that end a response or a turn beside the model's own end "
        "tokens, such as a line break where a line is an answer. The token belongs to the response.",
    )

    @property
    def samples_per_step(self) -> int:
        """Number of responses of one rollout."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def sampling(self) -> Sampling:
        """Settings by which the responses of a training step are drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_response_tokens)


class WarmStartConfig(Section):
    """A short supervised run on (prompt, response) pairs before reinforcement learning; 0 steps switches it off."""

    steps: Count = Field(0, ge=0)
    file: Path | None = Field(None, description="Parquet or JSON lines with the columns prompt and response.")
    sequences_per_step: Count = Field(256, ge=1)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    warmup_steps: Count = Field(10, ge=0)

    @model_validator(mode="after")
    def _needs_a_file(self) -> WarmStartConfig:
        if self.steps and self.file is None:
            raise ValueError("warm_start.file is needed when warm_start.steps > 0")
        return self


class TrainConfig(Section):
    """Length of the run."""

    steps: Count = Field(2000, ge=0, description="Rollout steps.")
    record_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="Steps of which the rollouts and the checkpoint before are kept, for `replay`. Rollouts of steps "
        "with an update that was skipped are kept anyway.",
    )
    max_skipped_steps: Count = Field(
        10, ge=1, description="The run ends when so many steps in a row had an update skipped for not being finite."
    )


class EvaluationConfig(Section):
    """Benchmarks: files of problems that are answered several times each, during training or by `evaluate`."""

    benchmarks: dict[str, Path] = Field(
        {}, description="Name: file, in a layout of data.train_files. Names and order of the table's columns."
    )
    every_steps: Count = Field(0, ge=0, description="Evaluate after every so many training steps; 0: never.")
    samples_per_prompt: Count = Field(8, ge=1, description="N of avg@N, pass@N and maj@N.")
    samples_of: dict[str, int] = Field({}, description="Name: N of the benchmarks with an N of their own.")
    temperature: float | None = Field(None, ge=0, description="None: rollout.temperature. 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    max_response_tokens: Count | None = Field(None, ge=1, description="None: rollout.max_response_tokens.")
    max_response_tokens_of: dict[str, int] = Field(
        {}, description="Name: longest response of the benchmarks with a limit of their own."
    )
    seed: int = Field(1, ge=0, le=LARGEST, description="Of the responses; the same at every evaluation of a run.")

    def samples(self, benchmark: str) -> int:
        """Number of responses to each problem of a benchmark."""
        return self.samples_of.get(benchmark, self.samples_per_prompt)


class CheckpointConfig(Section):
    """Resumable state: model, optimizer, controller, RNG, data position."""

    every_steps: Count = Field(50, ge=0, description="0: only at the end.")
    asynchronous: bool = Field(
        True, description="Write beside the next steps, from a copy of the state in host memory; false: wait for it."
    )
    format: Literal["dp_reshardable", "fully_reshardable"] = Field(
        "dp_reshardable",
        description="What is written of the distributed optimizer, by megatron-core's names. dp_reshardable: each "
        "rank's shard as it is. fully_reshardable: whole tensors by parameter, for programs that know no shards; every "
        "rank gathers the state of its model-parallel part, which takes nine times the host memory of a shard at 4 "
        "replicas and stops training meanwhile. Either is resumed under any layout.",
    )
    keep_last: int = Field(2, ge=1, description="Of checkpoints, and of the exports of export_every_steps.")
    keep_every: Count = Field(0, ge=0, description="Checkpoints of steps it divides stay for ever; 0: none.")
    accept_unverified: bool = Field(
        False, description="Resume from a checkpoint of an older version, which has no checksums to compare with."
    )
    export_every_steps: Count = Field(
        0,
        ge=0,
        description="Write the policy to exports/ as a Hugging Face directory while training goes on; 0: never.",
    )
    export_hf: bool = Field(True, description="Write the final policy as a Hugging Face directory.")


class LoggingConfig(Section):
    """Sinks beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    wandb: Annotated[Literal["off", "auto", "offline", "online"], BeforeValidator(off_is_a_word)] = Field(
        "auto", description="auto: as WANDB_MODE says; without it online with WANDB_API_KEY, else offline."
    )
    wandb_project: str = "megatron_entropic"
    samples_per_step: int = Field(4, ge=0, description="Responses written to samples.jsonl each step.")
    timeline_steps: Count = Field(
        20, ge=0, description="Steps of which timeline.json shows who worked when, the newest; 0: never."
    )
    rollouts_every_steps: Count = Field(
        20, ge=0, description="Keep all rollouts of every so many steps in rollouts/, token by token; 0: never."
    )
    rollouts_keep_last: Annotated[Count, Field(ge=1)] | None = Field(
        20,
        description="So many of these steps stay, the newest; null: all. Those of train.record_steps and steps with a "
        "skipped update are not counted and always stay.",
    )
    rollouts_keep_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        1000.0,
        description="Megabytes (10^6 bytes) that these files may take together: the oldest go, the newest stays "
        "however large it is. null: no limit.",
    )


class ClusterConfig(Section):
    """Ray, placement and the limits of every wait between processes."""

    address: Annotated[str, AfterValidator(_ray_address)] = Field(
        "local", description="local starts Ray on loopback; auto or host:port joins a running cluster."
    )
    nodes: list[Annotated[str, Field(pattern=r"^[\w.:-]+$")]] = Field(
        [], description="Names or addresses of the Ray nodes that must have joined before the run starts."
    )
    spare_nodes: Count = Field(
        0,
        ge=0,
        description="So many of cluster.nodes are kept empty, and begin to work when others are lost: engines are "
        "replaced there within the step, a lost policy rank's run goes on from its newest checkpoint.",
    )
    policy_ranks_per_node: int | None = Field(
        None, ge=1, description="Exactly so many policy ranks on a node; null fills nodes one after the other."
    )
    colocate: bool = Field(
        False,
        description="Engines share the devices of policy ranks, the first engine those of the first "
        "rollout.tensor_parallel ranks: one side sleeps while the other works. On a CPU, where vLLM cannot give memory "
        "back, only the order is that of GPUs.",
    )
    max_restarts: int = Field(
        0,
        ge=0,
        description="After the loss of a process: so many new starts from the newest checkpoint by itself, and one "
        "more for each spare node.",
    )
    max_engine_restarts: int = Field(
        2,
        ge=0,
        description="So many lost engines are replaced within the step that loses them, before a new attempt. Those "
        "that go on on a spare node do not count.",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: int | None = Field(
        1,
        ge=1,
        description="Threads of each policy rank and of each engine's worker on a CPU. Ranks and engines take turns, "
        "so each side can have all cores: null shares the cores of the driver's machine out among the ranks, and again "
        "among the workers. Sums are rounded by the number of threads: runs repeat bit for bit with the same number.",
    )
    transport: str = Field(
        "auto",
        description="What carries weights to the engines: nccl, ipc, gloo, or auto, which is nccl on GPUs, ipc with "
        "colocate, gloo on a CPU. gloo goes through host memory and works everywhere.",
    )
    startup_timeout_s: Seconds = 600.0
    generate_timeout_s: Seconds = 3600.0
    score_timeout_s: Seconds = 1800.0
    update_timeout_s: Seconds = 3600.0
    publish_timeout_s: Seconds = 600.0
    check_weights: bool = Field(
        False, description="After every publication compare a checksum of each tensor inside the engines; costs time."
    )
    checkpoint_timeout_s: Seconds = 1800.0

    def transport_on(self, device: Device) -> str:
        """Name of the transport that carries weights to the engines, a key of `names.TRANSPORTS`."""
        return transports_for(device, colocate=self.colocate)[0] if self.transport == "auto" else self.transport


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    entropy_control: EntropyControlConfig = EntropyControlConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def sequences_per_optimizer_step(self) -> int:
        """Number of responses of one optimizer step."""
        return self.rollout.samples_per_step // self.algorithm.optimizer_steps_per_rollout

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence the policy can meet: prompt and response."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def reference_is_the_start(self) -> bool:
        """Whether the KL penalty's reference is the policy with the adapters it began with: no copy of its weights."""
        kl = self.algorithm.kl
        return self.policy.lora.enabled and kl.coefficient > 0 and kl.reference_hf_dir is None

    @property
    def frozen_copies(self) -> dict[FrozenName, Path | None]:
        """Directories of the frozen models whose weights are held beside the policy's, as `algorithm.frozen_dirs`."""
        found = self.algorithm.frozen_dirs
        return {name: path for name, path in found.items() if not (name == "reference" and self.reference_is_the_start)}

    def evaluation_sampling(self, benchmark: str) -> Sampling:
        """Settings by which the responses to the problems of a benchmark are drawn."""
        own = self.evaluation
        limit = own.max_response_tokens or self.rollout.max_response_tokens
        return Sampling(
            self.rollout.temperature if own.temperature is None else own.temperature,
            own.top_p,
            own.top_k,
            own.max_response_tokens_of.get(benchmark, limit),
        )

    @property
    def max_engine_tokens(self) -> int:
        """Tokens of the longest sequence an engine can meet, benchmarks included."""
        of_benchmarks = [self.evaluation_sampling(name).max_response_tokens for name in self.evaluation.benchmarks]
        return self.data.max_prompt_tokens + max([self.rollout.max_response_tokens, *of_benchmarks])

    @property
    def loss_adds_up_over_tokens(self) -> bool:
        """Whether each token's loss depends on nothing but the token and what is known before the forward pass.

        Nothing is known of a loss given as module:function, so it gets whole micro-batches.
        """
        control, loss = self.entropy_control, self.algorithm.policy_loss
        entry = POLICY_LOSSES.get(loss)
        if entry is None or entry.whole_sequences or self.feedback == "microbatch_local":
            return False
        return not control.steers_alpha or control.denominator == "all_tokens"

    @property
    def output_head(self) -> Literal["logits", "recompute", "fused_loss"]:
        """Name of the output head that is used: policy.output_head with `auto` resolved."""
        if self.policy.output_head != "auto":
            return self.policy.output_head
        return "fused_loss" if self.loss_adds_up_over_tokens else "recompute"

    @property
    def feedback(self) -> str:
        """Name of the feedback that is used: entropy_control.feedback with `auto` resolved."""
        if self.entropy_control.feedback != "auto":
            return self.entropy_control.feedback
        algorithm = self.algorithm
        rescored = algorithm.epochs_per_rollout == 1 or algorithm.proximal_logprobs == "each_epoch"
        return "score_pass" if algorithm.optimizer_steps_per_rollout == 1 and rescored else "previous_step"
