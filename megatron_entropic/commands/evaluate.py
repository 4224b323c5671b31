"""The options of `megatron-entropic evaluate`, and the configuration they stand for."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.commands.options import number, whole
from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.load import ConfigError, validation_problems
from megatron_entropic.config.run import (
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_entropic.errors import UserError
from megatron_entropic.files.text import printable
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.training.machine import evaluation_violations

_USUAL_PROMPT_TOKENS, _USUAL_RESPONSE_TOKENS = 1024, 8192


def add_parser(commands: Any) -> None:
    """Add `evaluate` to the subparsers of the command line."""
    parser = commands.add_parser(
        "evaluate", help="avg@N, pass@k, maj@N of a model on benchmark files, with vLLM; continues where it was stopped"
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR|RUN", help="HF directory, or a finished run")
    parser.add_argument("--benchmarks", nargs="+", required=True, metavar="NAME=FILE", help="parquet or JSON lines")
    parser.add_argument(
        "--samples",
        nargs="+",
        default=["8"],
        metavar="N|NAME=N",
        help="responses to each problem: for all, and for single benchmarks (8 aime24=32)",
    )
    parser.add_argument("--temperature", type=number(least=0), default=1.0, help="0: greedy (default: 1)")
    parser.add_argument("--top-p", type=number(above=0, most=1), default=1.0)
    parser.add_argument("--top-k", type=whole(-1), default=-1)
    parser.add_argument(
        "--max-tokens", type=whole(1), help="of a response (default: 8192, or what the model's positions leave)"
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=whole(1),
        help="a longer problem is an error (default: 1024, or half of the model's positions)",
    )
    parser.add_argument("--no-chat-template", action="store_true", help="prompts as they are in the file")
    parser.add_argument("--template-date", metavar="YYYY-MM-DD", help="for chat templates that ask for the date")
    parser.add_argument("--system-prompt", metavar="TEXT", help="as data.system_prompt")
    parser.add_argument("--prompt-suffix", default="", metavar="TEXT", help="as data.prompt_suffix")
    parser.add_argument("--prompt-key", default="prompt", metavar="KEY", help="as data.prompt_key (default: prompt)")
    parser.add_argument("--answer-key", metavar="KEY", help="as data.answer_key, for files that have it")
    parser.add_argument("--verifier", default="math", help="as reward.verifier (default: math)")
    parser.add_argument("--answer", metavar="WAY", help="as reward.answer (default: the verifier's own way)")
    parser.add_argument("--answer-pattern", default="", metavar="REGEX", help="as reward.answer_pattern")
    parser.add_argument("--environment", metavar="NAME", help="as environment.name: conversations")
    parser.add_argument(
        "--environment-settings", type=_settings, default={}, metavar="JSON", help="as environment.settings"
    )
    parser.add_argument("--max-turns", type=whole(1), default=8, metavar="N", help="as environment.max_turns")
    parser.add_argument("--max-turn-tokens", type=whole(1), metavar="N", help="as environment.max_turn_tokens")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="as rollout.stop; \\n is a line break")
    parser.add_argument("--workers", type=whole(0), default=2, metavar="N", help="verifier processes (default: 2)")
    parser.add_argument(
        "--verifier-timeout", type=number(above=0), default=10.0, metavar="S", help="of a response, seconds"
    )
    parser.add_argument("--engines", type=whole(1), default=1, metavar="N")
    parser.add_argument("--tensor-parallel", type=whole(1), default=1, metavar="N", help="GPUs of each engine")
    parser.add_argument("--max-concurrent-sequences", type=whole(1), default=256, metavar="N", help="of each engine")
    parser.add_argument(
        "--kv-cache-gb", type=number(above=0), default=1.0, metavar="G", help="of each engine, on a CPU"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--ray-address", default="local", help="as cluster.address (default: local)")
    parser.add_argument(
        "--generate-timeout", type=number(above=0), default=86400.0, metavar="S", help="of a benchmark, seconds"
    )
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--label", help="name of the model in the table (default: that of its directory)")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    config = evaluation_config(options)
    # Ray reads its settings when it is imported.
    prepare_ray_environment(config.cluster)
    from megatron_entropic.evaluation.store import SUMMARY_FILE, TABLE_FILE
    from megatron_entropic.training.evaluation import evaluate

    label = options.label or options.model.absolute().name
    evaluate(config, config.run.output_dir, label)
    console = Console(highlight=False)
    table = (config.run.output_dir / TABLE_FILE).read_text(encoding="utf-8")
    for text in (table, f"responses and numbers: {config.run.output_dir / SUMMARY_FILE}"):
        console.print(printable(text), markup=False, soft_wrap=True)


def _settings(text: str) -> dict[str, Any]:
    """Value of --environment-settings.

    Raises:
        argparse.ArgumentTypeError: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected an object such as {{"cost": 0.2}}, found {text}')
    return value


def _environment(options: argparse.Namespace) -> EnvironmentConfig:
    return EnvironmentConfig(
        name=options.environment,
        settings=options.environment_settings,
        max_turns=options.max_turns,
        max_turn_tokens=options.max_turn_tokens,
    )


def evaluation_config(options: argparse.Namespace) -> Config:
    """Configuration of an evaluation, made from the options of the command.

    Raises:
        ConfigError: listing everything that is wrong with the options, the model and the files.
    """
    problems: list[str] = []
    benchmarks = _pairs(
        "--benchmarks", [part for word in options.benchmarks for part in _apart_at_commas(word)], problems
    )
    samples = [word for word in options.samples if "=" not in word]
    samples_of = _pairs("--samples", [word for word in options.samples if "=" in word], problems)
    problems += [
        f"--samples {word!r}: expected an integer of at least 1"
        for word in (*samples, *samples_of.values())
        if not _is_count(word)
    ]
    # What cannot be read is told once; the rest is looked at without it.
    samples = [word for word in samples if _is_count(word)]
    samples_of = {name: word for name, word in samples_of.items() if _is_count(word)}
    if len(samples) > 1:
        problems.append(f"--samples: more than one number for all benchmarks: {' '.join(samples)}")
    if not benchmarks:
        raise ConfigError("evaluate", problems)
    prompt_tokens, response_tokens = _lengths(options)
    try:
        config = Config(
            run=RunConfig(output_dir=options.output_dir.absolute()),
            model=ModelConfig(hf_dir=_hf_dir(options.model), dtype=options.dtype),
            data=DataConfig(
                train_files=[Path(file) for file in benchmarks.values()],
                max_prompt_tokens=prompt_tokens,
                apply_chat_template=not options.no_chat_template,
                system_prompt=options.system_prompt,
                prompt_suffix=options.prompt_suffix,
                template_date=options.template_date,
                prompt_key=options.prompt_key,
                answer_key=options.answer_key,
            ),
            reward=RewardConfig(
                verifier=options.verifier,
                answer=options.answer,
                answer_pattern=options.answer_pattern,
                workers=options.workers,
                timeout_s=options.verifier_timeout,
            ),
            environment=_environment(options),
            rollout=RolloutConfig(
                stop=[text.replace("\\n", "\n") for text in options.stop],
                engines=options.engines,
                tensor_parallel=options.tensor_parallel,
                max_response_tokens=response_tokens,
                max_concurrent_sequences=options.max_concurrent_sequences,
                kv_cache_gb=options.kv_cache_gb,
            ),
            evaluation=EvaluationConfig.model_validate(
                {
                    "benchmarks": {name: Path(file).absolute() for name, file in benchmarks.items()},
                    "samples_per_prompt": samples[-1] if samples else 8,
                    "samples_of": samples_of,
                    "temperature": options.temperature,
                    "top_p": options.top_p,
                    "top_k": options.top_k,
                    "seed": options.seed,
                }
            ),
            cluster=ClusterConfig(
                address=options.ray_address, device=options.device, generate_timeout_s=options.generate_timeout
            ),
        )
    except ValidationError as error:
        raise ConfigError("evaluate", [*problems, *validation_problems(error)]) from error
    problems += [violation.message for violation in evaluation_violations(config)]
    if problems:
        raise ConfigError("evaluate", problems)
    return config


def _lengths(options: argparse.Namespace) -> tuple[int, int]:
    """Most tokens of a prompt and of a response: as given, else the usual ones that fit into the model's positions."""
    try:
        positions = read_dimensions(_hf_dir(options.model)).max_position_embeddings
    except UserError:  # told with everything else that is wrong
        positions = _USUAL_PROMPT_TOKENS + _USUAL_RESPONSE_TOKENS
    prompt = options.max_prompt_tokens or max(1, min(_USUAL_PROMPT_TOKENS, positions // 2))
    response = options.max_tokens or max(1, min(_USUAL_RESPONSE_TOKENS, positions - prompt))
    return prompt, response


def _hf_dir(model: Path) -> Path:
    """Hugging Face directory of the model: that of a finished run, or the given one itself."""
    exported = model / "hf"
    return (exported if (exported / "config.json").is_file() else model).absolute()


def _apart_at_commas(word: str) -> list[str]:
    """Split `a=x.parquet,b=y.parquet` in two; a comma in the path of a file that is there is part of the path."""
    parts: list[str] = []
    for part in word.split(","):
        whole = f"{parts[-1]},{part}" if parts else part
        begins_another = re.match(r"[\w.-]+=.", part) and not Path(whole.partition("=")[2]).exists()
        if parts and (not begins_another or not part):
            parts[-1] = whole
        else:
            parts.append(part)
    # A folder of a longer path can look like the beginning of another benchmark: seed=3 in "a=v1,seed=3/h.parquet".
    return [word] if Path(word.partition("=")[2]).exists() else parts


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdigit() and int(word) > 0


def _pairs(option: str, words: list[str], problems: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (separator and name and value):
            problems.append(f"{option} {word!r}: expected NAME={'FILE' if option == '--benchmarks' else 'N'}")
        elif name in found:
            problems.append(f"{option}: {name} is given twice")
        else:
            found[name] = value
    return found
