"""Prompts and rewards: what is asked, and how the answers are judged."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from megatron_entropic.config.base import Count, Seconds, Section, one_is_a_list
from megatron_entropic.config.names import ANSWERS, ENVIRONMENTS, VERIFIERS


class DataConfig(Section):
    """Prompts."""

    train_files: Annotated[list[Path], BeforeValidator(one_is_a_list)] = Field(
        min_length=1, description="Parquet, JSON lines, or a directory that datasets' save_to_disk wrote."
    )
    file_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Share of each train file in every stretch of prompts. None: every row counts alike."
    )
    max_prompt_tokens: Count = Field(1024, ge=1)
    too_long: Literal["error", "drop"] = Field("error", description="What to do with prompts over max_prompt_tokens.")
    skip_malformed: bool = Field(False, description="Leave out rows that cannot be used instead of refusing to start.")
    apply_chat_template: bool = Field(False, description="Format prompts with the tokenizer's chat template.")
    template_date: date | None = Field(
        None,
        description="Day (YYYY-MM-DD) for chat templates that ask for the date. None: such a template is refused, as "
        "prompts would change from day to day.",
    )
    system_prompt: str | None = Field(None, description="System message of prompts that have none.")
    prompt_suffix: str = Field("", description="Text after each problem.")
    prompt_key: str = Field(
        "prompt", min_length=1, description="Column of messages, or of a string; dots lead into nested columns."
    )
    answer_key: str | None = Field(
        None,
        min_length=1,
        description="Column of the ground truth. None: reward_model.ground_truth, answer or ground_truth.",
    )
    duplicates: Literal["keep", "drop"] = Field("keep", description="Later copies of a problem; reported either way.")
    benchmark_overlap: Literal["keep", "drop"] = Field(
        "keep", description="Training problems that equal or overlap one of evaluation.benchmarks; reported either way."
    )
    overlap_words: int = Field(13, ge=2, description="Problems overlap if they share so many words in a row.")
    pass_rates: Path | None = Field(
        None,
        description="Responses of an `evaluate` of the train file (NAME.parquet): for pass_rate_min, _max and order.",
    )
    pass_rate_min: float = Field(0.0, ge=0, le=1, description="Leave out prompts whose recorded pass rate is lower.")
    pass_rate_max: float = Field(1.0, ge=0, le=1, description="Leave out prompts whose recorded pass rate is higher.")
    order: Literal["shuffled", "as_stored", "easy_to_hard"] = Field(
        "shuffled", description="Order of an epoch. easy_to_hard: a curriculum, falling recorded pass rates."
    )
    order_blur: float = Field(
        0.2, ge=0, description="easy_to_hard: prompts further apart than this share of an epoch keep their order."
    )


class EnvironmentConfig(Section):
    """What answers the policy's turns: conversations with tools, games. `environment: NAME` alone will do."""

    short: ClassVar[str | None] = "name"

    name: str | None = Field(
        None,
        description=f"{', '.join(ENVIRONMENTS)}, or module:Class; see docs/environments.md. None: a response is one "
        "turn, which reward.verifier judges.",
    )
    settings: dict[str, Any] = Field({}, description="Keyword arguments of the class.")
    max_turns: Count = Field(8, ge=1, description="Turns of the policy; a conversation ends with the last one.")
    max_turn_tokens: Annotated[Count, Field(ge=1)] | None = Field(
        None,
        description="Tokens of one turn. None: what is left of rollout.max_response_tokens, which counts all that "
        "comes after the prompt, what the environment writes included.",
    )
    reply_timeout_s: Seconds = Field(
        30.0, description="Wall time of one call of the environment; a conversation whose call takes longer ends."
    )
    workers: int = Field(1, ge=1, le=1024, description="Processes that environments run in.")
    packages_dir: Path | None = Field(
        None,
        description="Folder of Python packages that these processes look into before any other, for environments that "
        "need other versions than this program. None: no folder.",
    )

    @property
    def section(self) -> EnvironmentConfig | None:
        """The section, None without an environment."""
        return None if self.name is None else self


class JudgeConfig(Section):
    """The verifier `judge`: a language model behind an OpenAI-compatible API; see docs/verifiers.md."""

    urls: list[str] = Field(
        [], description="Base URLs, such as http://127.0.0.1:8000/v1. Requests are spread over them, retries go on."
    )
    model: str = Field("", description="Name of the model, as the server knows it.")
    template: str | None = Field(
        None,
        description="The user message, in which {prompt}, {response} and {ground_truth} are replaced. null: one that "
        "asks whether the response is right, for Verdict: 1 or Verdict: 0.",
    )
    system_prompt: str | None = Field(None, description="System message before it.")
    verdict_pattern: str = Field(
        r"Verdict:\s*([0-9]+(?:\.[0-9]+)?)",
        description="Regular expression of the verdict in the judge's answer. The last match counts, of it the first "
        "group, if it has any.",
    )
    verdicts: dict[str, float] = Field(
        {}, description="Verdict: reward, such as {yes: 1, no: 0}, in any case. Empty: the verdict is a number."
    )
    best: float = Field(1.0, gt=0, description="Number that is a reward of 1; one beyond it or below 0 is none.")
    votes: int = Field(1, ge=1, le=64, description="Answers asked for each response; the reward is their mean.")
    temperature: float = Field(0.0, ge=0, description="Of the judge; > 0 for votes.")
    max_tokens: Count = Field(512, ge=1, description="Longest answer of the judge.")
    api_key_variable: str | None = Field(
        None, description="Environment variable with the API key, such as OPENAI_API_KEY. Its value is never written."
    )
    request_timeout_s: Seconds = Field(60.0, description="Wall time of one request.")
    retries: int = Field(4, ge=0, description="Further tries of a request that failed and may succeed.")
    backoff_s: float = Field(1.0, ge=0, description="Wait before the first retry, doubled before each of the next.")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests at once of each of reward.workers.")
    token_limit: Count | None = Field(
        None, ge=1, description="Tokens of all prompts and answers, after which nothing is asked. null: no limit."
    )
    cache_file: Path | None = Field(
        None, description="SQLite file of the judge's answers. null: judge.sqlite in the run's folder."
    )


class RewardConfig(Section):
    """How a response is judged."""

    verifier: str = Field("math", description=f"{', '.join(VERIFIERS)}, or module:function.")
    answer: str | None = Field(
        None,
        description=f"How the answer is found in a response: {', '.join(ANSWERS)}. None: the verifier's own way, boxed "
        "for math, whole_response for countdown and exact; the others look at responses as they are. Base models do "
        "not box: first_line after few-shot examples, last_number of a text.",
    )
    answer_pattern: str = Field(
        "",
        description="Regular expression of answer=regex. The last match counts, of it the first group, if it has any; "
        "^ and $ are those of a line, a dot ends with it.",
    )
    added: dict[str, float] = Field(
        {}, description="Name: weight of further rewards, named as verifiers are, which are added to the verifier's."
    )
    format_pattern: str = Field(
        r".*\\boxed\{.+\}[^{}]*",
        description="What the whole response must match for `format` (a dot is any character).",
    )
    judge: JudgeConfig = JudgeConfig()
    overlong_buffer_tokens: Count = Field(
        0, ge=0, description="DAPO's soft punishment over the last so many tokens before max_response_tokens; 0: none."
    )
    overlong_weight: float = Field(1.0, ge=0, description="Punishment of a response of max_response_tokens.")
    batch_size: int = Field(64, ge=1, description="Responses of one call of a verifier that takes batches.")
    workers: int = Field(1, ge=0, le=1024, description="Verifier processes; 0 judges in the driver.")
    timeout_s: Seconds = Field(
        30.0, description="Wall time of one response or batch; a process that passes it is killed."
    )
    cpu_time_s: Seconds = Field(
        5.0, description="CPU time of one response: what a busy machine does not use up. Ends in a timeout too."
    )
    memory_limit_gb: float = Field(
        4.0, gt=0, description="Address space of each process of a built-in verifier; module:function has no limit."
    )
