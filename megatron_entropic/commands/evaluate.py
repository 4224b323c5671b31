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
from megatron_entropic.config.load import ConfigError, validation_problems
from megatron_entropic.config.run import Config
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

    def sets(option: str, key: str, words: str = "", **how: Any) -> None:
        """Add an option that sets a key of the configuration; it goes by that name in `_sections`."""
        parser.add_argument(option, dest=key, help=words or f"as {key}", **how)

    count: dict[str, Any] = {"type": whole(1), "metavar": "N"}
    seconds: dict[str, Any] = {"type": number(above=0), "metavar": "S"}

    parser.add_argument("--model", type=Path, required=True, metavar="DIR|RUN", help="HF directory, or a finished run")
    parser.add_argument("--benchmarks", nargs="+", required=True, metavar="NAME=FILE", help="parquet or JSON lines")
    parser.add_argument(
        "--samples",
        nargs="+",
        default=["8"],
        metavar="N|NAME=N",
        help="responses to each problem: for all, and for single benchmarks (8 aime24=32)",
    )
    sets("--temperature", "evaluation.temperature", "0: greedy (default: 1)", type=number(least=0), default=1.0)
    sets("--top-p", "evaluation.top_p", type=number(above=0, most=1), default=1.0)
    sets("--top-k", "evaluation.top_k", type=whole(-1), default=-1)
    parser.add_argument(
        "--max-tokens",
        nargs="+",
        default=[],
        metavar="N|NAME=N",
        help="of a response: for all (default: 8192, or what the model's positions leave), and for single benchmarks",
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=whole(1),
        help="a longer problem is an error (default: 1024, or half of the model's positions)",
    )
    sets("--no-chat-template", "data.apply_chat_template", "prompts as they are in the file", action="store_false")
    sets("--template-date", "data.template_date", "for templates that ask for the date", metavar="YYYY-MM-DD")
    sets("--system-prompt", "data.system_prompt", metavar="TEXT")
    sets("--prompt-suffix", "data.prompt_suffix", default="", metavar="TEXT")
    sets("--prompt-key", "data.prompt_key", "as data.prompt_key (default: prompt)", default="prompt", metavar="KEY")
    sets("--answer-key", "data.answer_key", "as data.answer_key, for files that have it", metavar="KEY")
    sets("--verifier", "reward.verifier", "as reward.verifier (default: math)", default="math", metavar="NAME")
    sets("--answer", "reward.answer", "as reward.answer (default: the verifier's own way)", metavar="WAY")
    sets("--answer-pattern", "reward.answer_pattern", default="", metavar="REGEX")
    sets("--environment", "environment.name", "as environment.name: conversations", metavar="NAME")
    sets("--environment-settings", "environment.settings", type=_settings, default={}, metavar="JSON")
    sets("--max-turns", "environment.max_turns", default=8, **count)
    sets("--max-turn-tokens", "environment.max_turn_tokens", **count)
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="as rollout.stop; \\n is a line break")
    sets("--workers", "reward.workers", "verifier processes (default: 2)", type=whole(0), default=2, metavar="N")
    sets("--verifier-timeout", "reward.timeout_s", "of a response, seconds", default=10.0, **seconds)
    sets("--engines", "rollout.engines", default=1, **count)
    sets("--tensor-parallel", "rollout.tensor_parallel", "GPUs of each engine", default=1, **count)
    sets("--max-concurrent-sequences", "rollout.max_concurrent_sequences", "of each engine", default=256, **count)
    sets(
        "--kv-cache-gb", "rollout.kv_cache_gb", "of an engine on a CPU", type=number(above=0), default=1.0, metavar="G"
    )
    sets("--dtype", "model.dtype", choices=["bfloat16", "float32"], default="bfloat16")
    sets("--device", "cluster.device", choices=["auto", "cpu", "cuda"], default="auto")
    sets("--ray-address", "cluster.address", "as cluster.address (default: local)", default="local")
    sets("--generate-timeout", "cluster.generate_timeout_s", "of a benchmark, seconds", default=86400.0, **seconds)
    sets("--seed", "evaluation.seed", type=whole(0), default=1)
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


def evaluation_config(options: argparse.Namespace) -> Config:
    """Configuration of an evaluation, made from the options of the command.

    Raises:
        ConfigError: listing everything that is wrong with the options, the model and the files.
    """
    problems: list[str] = []
    benchmarks = _pairs(
        "--benchmarks", [part for word in options.benchmarks for part in _apart_at_commas(word)], problems
    )
    samples, samples_of = _counts("--samples", options.samples, problems)
    max_tokens, max_tokens_of = _counts("--max-tokens", options.max_tokens, problems)
    if not benchmarks:
        raise ConfigError("evaluate", problems)
    prompt_tokens, response_tokens = _lengths(options, max_tokens)
    sections = _sections(options)
    sections["run"] = {"output_dir": options.output_dir.absolute()}
    sections["model"] |= {"hf_dir": _hf_dir(options.model)}
    sections["data"] |= {"train_files": list(benchmarks.values()), "max_prompt_tokens": prompt_tokens}
    sections["rollout"] |= {
        "max_response_tokens": response_tokens,
        "stop": [text.replace("\\n", "\n") for text in options.stop],
    }
    sections["evaluation"] |= {
        "benchmarks": {name: Path(file).absolute() for name, file in benchmarks.items()},
        "samples_per_prompt": samples or 8,
        "samples_of": samples_of,
        "max_response_tokens_of": max_tokens_of,
    }
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        raise ConfigError("evaluate", [*problems, *validation_problems(error)]) from error
    problems += [violation.message for violation in evaluation_violations(config)]
    if problems:
        raise ConfigError("evaluate", problems)
    return config


def _sections(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Values of the options that are called by a key of the configuration, section by section."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in vars(options).items():
        section, dot, name = key.partition(".")
        if dot:
            sections.setdefault(section, {})[name] = value
    return sections


def _lengths(options: argparse.Namespace, max_tokens: int | None) -> tuple[int, int]:
    """Most tokens of a prompt and of a response: as given, else the usual ones that fit into the model's positions."""
    try:
        positions = read_dimensions(_hf_dir(options.model)).max_position_embeddings
    except UserError:  # told with everything else that is wrong
        positions = _USUAL_PROMPT_TOKENS + _USUAL_RESPONSE_TOKENS
    prompt = options.max_prompt_tokens or max(1, min(_USUAL_PROMPT_TOKENS, positions // 2))
    response = max_tokens or max(1, min(_USUAL_RESPONSE_TOKENS, positions - prompt))
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


def _counts(option: str, words: list[str], problems: list[str]) -> tuple[int | None, dict[str, int]]:
    """The numbers of an option, `N|NAME=N`: the one for all benchmarks, if there is one, and those of single ones."""
    for_all = [word for word in words if "=" not in word]
    by_name = _pairs(option, [word for word in words if "=" in word], problems)
    problems += [
        f"{option} {word!r}: expected an integer of at least 1"
        for word in (*for_all, *by_name.values())
        if not _is_count(word)
    ]
    # What cannot be read is told once; the rest is looked at without it.
    for_all = [word for word in for_all if _is_count(word)]
    if len(for_all) > 1:
        problems.append(f"{option}: more than one number for all benchmarks: {' '.join(for_all)}")
    return int(for_all[-1]) if for_all else None, {name: int(n) for name, n in by_name.items() if _is_count(n)}


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
