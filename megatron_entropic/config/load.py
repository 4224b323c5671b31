"""From a YAML file and dotted overrides to a checked `Config`; everything that is wrong comes in one error.

    megatron-entropic train run.yaml rollout.temperature=0.6 policy.tensor_parallel=2

A value that cannot be read does not hide the other problems: it is replaced by its default, and the checks that
need several values (`checks`) still run on the rest.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megatron_entropic.config.base import Violation
from megatron_entropic.config.checks import config_warnings, violations
from megatron_entropic.config.names import OFF, controller_entry
from megatron_entropic.config.reading import Reading, Unreadable, apply_override, read_file, section_type
from megatron_entropic.config.run import Config
from megatron_entropic.errors import UserError

__all__ = [
    "ConfigError",
    "batch_arithmetic",
    "config_warnings",
    "dump_config",
    "key_names",
    "load_config",
    "read_config",
]

# Stand-ins for required values, so that the checks of everything else can run when one is missing.
_PLACEHOLDERS: dict[str, Any] = {
    "model": {"hf_dir": "."},
    "model.hf_dir": ".",
    "data": {"train_files": ["."]},
    "data.train_files": ["."],
}
_NEAR_ENOUGH = 0.6


class ConfigError(UserError):
    """A configuration that cannot run; `violations` holds one message for each thing that is wrong."""

    def __init__(self, source: str, problems: list[str]):
        self.violations = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        bullets = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
        super().__init__(f"{source}: {count}\n{bullets}")


def load_config(
    path: Path | str, overrides: Iterable[str] = (), *, checks: Callable[[Config], Iterable[Violation]] = violations
) -> Config:
    """Read, override, check and resolve a configuration, whatever machine it is meant for.

    Args:
        path: YAML file with the sections of `Config`.
        overrides: `dotted.key=value`, the value in YAML; later ones win.
        checks: every check of what could be read, those of values alone by default.

    Relative paths are taken from the current directory and made absolute.

    Raises:
        ConfigError: listing every violation at once.
    """
    config, problems = read_config(path, overrides, checks=checks)
    if problems:
        raise ConfigError(str(path), problems)
    return config


def read_config(
    path: Path | str, overrides: Iterable[str] = (), *, checks: Callable[[Config], Iterable[Violation]] = violations
) -> tuple[Config, list[str]]:
    """Read a configuration as `load_config` does, and go on with the values that are readable.

    Args:
        path, overrides: as in `load_config`.
        checks: every check of what could be read, those of values alone by default.

    Returns:
        (the configuration, with defaults in place of values that cannot be read; every violation).

    Raises:
        ConfigError: the file cannot be read at all.
    """
    try:
        reading = read_file(Path(path), Config)
    except Unreadable as error:
        raise ConfigError(str(path), [str(error)]) from error
    for override in overrides:
        apply_override(reading, override, Config)
    config, problems, broken = _validate(reading)
    _resolve_paths(config)
    problems += [violation.message for violation in checks(config) if not _touches(violation, broken)]
    return config, problems


def dump_config(config: Config, path: Path) -> None:
    """Write every value, defaults included, as YAML that `load_config` reads back to an equal `Config`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    path.write_text("# The configuration of this run, every value resolved.\n" + text, encoding="utf-8")


def batch_arithmetic(config: Config) -> list[tuple[str, str]]:
    """The numbers that follow from the configuration, as (name, derivation) rows for one table."""
    rollout, policy = config.rollout, config.policy
    algorithm = config.algorithm
    parts, updates = algorithm.optimizer_steps_per_rollout, algorithm.updates_per_rollout
    responses = rollout.samples_per_step
    per_replica = -(-config.sequences_per_optimizer_step // policy.data_parallel)
    longest = config.max_sequence_tokens
    engine_ranks = rollout.engines * rollout.tensor_parallel
    layout = f"{policy.tensor_parallel} tensor x {policy.pipeline_parallel} pipeline x {policy.data_parallel} data"
    if policy.context_parallel > 1:
        layout += f" x {policy.context_parallel} context"
    rows = [
        ("responses per step", f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} = {responses:,}"),
        (
            "optimizer steps",
            f"{config.train.steps:,} steps x {updates} = {config.train.steps * updates:,}"
            + (f", in {algorithm.epochs_per_rollout} epochs of {parts}" if algorithm.epochs_per_rollout > 1 else ""),
        ),
        (
            "responses per optimizer step",
            f"{responses:,} / {parts} = {config.sequences_per_optimizer_step:,}"
            + (f", about {per_replica:,} per data-parallel replica" if policy.data_parallel > 1 else ""),
        ),
        (
            "longest sequence",
            f"{config.data.max_prompt_tokens:,} prompt + {rollout.max_response_tokens:,} response = {longest:,} tokens",
        ),
        ("response tokens per step", f"at most {responses * rollout.max_response_tokens:,}"),
        (
            "micro-batch",
            f"{policy.tokens_per_microbatch:,} packed tokens, at most "
            f"{-(-per_replica // max(1, policy.tokens_per_microbatch // longest)):,} of them per optimizer step",
        ),
        ("output head", f"{config.output_head} (policy.output_head={policy.output_head})"),
        ("policy ranks", f"{layout} = {policy.world_size}"),
        ("rollout ranks", f"{rollout.engines} engine(s) x {rollout.tensor_parallel} tensor = {engine_ranks}"),
    ]
    if config.warm_start.steps:
        warm = config.warm_start
        pairs = warm.steps * warm.sequences_per_step
        rows.append(("warm start", f"{warm.steps:,} steps x {warm.sequences_per_step:,} = {pairs:,} pairs"))
    rows.append(("policy loss", f"{algorithm.policy_loss}, advantage {algorithm.advantage}"))
    rows.append(("entropy control", _entropy_control_words(config)))
    return rows


def _entropy_control_words(config: Config) -> str:
    control, temperature = config.entropy_control, config.rollout.temperature
    if not control.enabled:
        return "off"
    target = f"{control.target:g}" if isinstance(control.target, float) else f"{control.target} the initial entropy"
    if control.target_schedule.kind != "constant":
        moving = control.target_schedule
        rollouts = -(-moving.steps // config.algorithm.updates_per_rollout)
        target += f" to {moving.end} ({moving.kind}, {moving.steps:,} optimizer steps: until step {rollouts:,})"
    gains = ""
    if controller_entry(control.controller).answers_error:
        gains = f", K_p {control.kp:g}" + (f", K_i {control.ki:g}" if control.controller == "pi" else "")
    name = control.controller.upper() if gains else control.controller
    guard = "" if control.guard == OFF else f", under a {control.guard}"
    moves = "" if control.reanchor == OFF else ", target moved where the data change"
    source = config.feedback.replace("_", " ")
    aim = f" at {target} nats (T = {temperature:g})" if controller_entry(control.controller).reads_target else ""
    return f"{name}{aim}{gains}{guard}{moves}, H from {source}"


def key_names(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the tree, sections before their keys."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = section_type(field.annotation)
        if inner is not None:
            yield from key_names(inner, f"{prefix}{name}.")


def _validate(reading: Reading) -> tuple[Config, list[str], set[str]]:
    """The `Config` of what is readable, the problems, and the dotted keys that could not be read."""
    raw, problems, broken = reading.values, list(reading.problems), set(reading.misread)
    for section in ("model", "data"):
        if section in broken:
            _repair(raw, (section,))
        raw.setdefault(section, {})
    while True:
        try:
            return Config.model_validate(raw), problems, broken
        except ValidationError as error:
            for item in error.errors():
                path, shown = _names_of(tuple(part for part in item["loc"] if isinstance(part, str)))
                key = ".".join(path)
                problem = _describe(shown, item) + reading.place(key)
                if problem not in problems and not (key in reading.misread and item["type"] == "missing"):
                    problems.append(problem)
                if key not in broken or item["type"] == "missing":
                    broken.add(key)
                    _repair(raw, path)


def validation_problems(error: ValidationError) -> list[str]:
    """Problems that pydantic found, in the words of a user who wrote `key: value`."""
    return [_describe(".".join(str(part) for part in item["loc"]) or "value", item) for item in error.errors()]


def _names_of(path: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The key at which a problem lies, and the name to show, which has a table's row too.

    Pydantic adds names of its own: which member of a union it tried, which function it called.
    """
    section: type[BaseModel] | None = Config
    depth, annotation = 0, None
    while section is not None and depth < len(path):
        known = section.model_fields.get(path[depth])
        annotation = None if known is None else known.annotation
        section = section_type(annotation)
        depth += 1
    rows = int(get_origin(annotation) is dict)
    return path[:depth], ".".join(path[: depth + rows])


def _repair(raw: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove a value that cannot be read, or stand in for a required one."""
    *sections, last = path
    target = raw
    for part in sections:
        target = target[part]
    target.pop(last, None)
    if ".".join(path) in _PLACEHOLDERS:
        target[last] = copy.deepcopy(_PLACEHOLDERS[".".join(path)])


def _describe(key: str, item: Any) -> str:
    """One pydantic error in the words of a user who wrote `key: value`."""
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden" and "." in item["loc"][-1]:
        return f"unknown key {key!r}: in a file, sections are nested (only overrides are written with dots)"
    if kind == "extra_forbidden":
        nearest = _nearest_key(key)
        return f"unknown key {key}" + (f"; did you mean {nearest}?" if nearest else "")
    if kind == "missing":
        return f"{key} is required"
    if kind == "value_error":
        return message if message.startswith(key) else f"{key}: {message}"
    if kind == "string_unicode":
        return f"{key}={item['input']!r}: not valid Unicode, there is half a character in it"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}={item['input']!r}: is a section, and needs keys of its own"
    message = message.replace("Input should be", "should be").replace("Input is not a valid path", "should be a path")
    message = message.removesuffix(" for <class 'pathlib.Path'>")
    if item["input"] is None:
        return f"{key} is empty: {message[:1].lower()}{message[1:]}"
    position = "".join(f"[{part}]" for part in item["loc"] if isinstance(part, int))
    return f"{key}{position}={item['input']!r}: {message[:1].lower()}{message[1:]}"


def _nearest_key(unknown: str) -> str | None:
    """The known key most like an unknown one, or all that have its last part in another section."""
    last = unknown.rpartition(".")[2]
    elsewhere = [key for key in key_names() if "." in key and key.rpartition(".")[2] == last]
    if elsewhere:
        return " or ".join(elsewhere)

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, unknown, candidate).ratio()
        part = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
        return max(whole, part - 0.1) + 0.01 * whole

    best = max(key_names(), key=likeness)
    return best if likeness(best) >= _NEAR_ENOUGH else None


def _touches(violation: Violation, broken: set[str]) -> bool:
    """Whether a check used a value that could not be read, so that its verdict means nothing."""
    pairs = [(key + ".", bad + ".") for key in violation.keys for bad in broken]
    return any(key.startswith(bad) or bad.startswith(key) for key, bad in pairs)


def _resolve_paths(section: BaseModel) -> None:
    """Make every path of the tree absolute, from the current directory."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            _resolve_paths(value)
        elif isinstance(value, Path):
            setattr(section, name, value.expanduser().absolute())
        elif isinstance(value, list) and all(isinstance(item, Path) for item in value):
            setattr(section, name, [item.expanduser().absolute() for item in value])
        elif isinstance(value, dict) and all(isinstance(item, Path) for item in value.values()):
            setattr(section, name, {key: item.expanduser().absolute() for key, item in value.items()})
