"""`megatron-entropic rollouts`: the responses of a step, in the terminal or as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from megatron_entropic.commands.options import whole
from megatron_entropic.config.data import RewardConfig
from megatron_entropic.config.names import controller_entry
from megatron_entropic.data import load_tokenizer
from megatron_entropic.errors import UserError
from megatron_entropic.files.text import printable, shortened
from megatron_entropic.observability.records import read_rollouts, recorded_steps, rollouts_path
from megatron_entropic.reports.pages import write_page
from megatron_entropic.reports.rollouts import Excerpt, ResponseView, StepView, rollouts_page, view_step
from megatron_entropic.reports.run import Run, load_run
from megatron_entropic.rewards import build_reader
from megatron_entropic.rewards.verifier import Reader

_TOUCH_COLOURS = {"up": "green", "down": "red"}
_LEAST_SHADE = 0.05
"""Share of the strongest entropy below which a token has no background."""
_GIVEN = Style(color="bright_black", italic=True)
"""Of what the environment wrote."""


def add_parser(commands: Any) -> None:
    """Add `rollouts` to the subparsers of the command line."""
    parser = commands.add_parser("rollouts", help="show recorded responses of a step, coloured by token entropy")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run that has recorded steps, see logging.rollouts_every_steps"
    )
    parser.add_argument("--step", type=whole(0), metavar="N", help="(default: the newest that was recorded)")
    parser.add_argument("--prompt", type=whole(0), nargs="+", default=[], metavar="INDEX", help="prompts to show")
    parser.add_argument(
        "--prompts",
        type=whole(1),
        default=2,
        metavar="N",
        help="without --prompt: N, first those whose rewards differ (default: 2)",
    )
    parser.add_argument(
        "--max-tokens", type=whole(1), default=2000, metavar="N", help="shown of a response (default: 2000)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="(default: that of the run's model)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of showing")
    parser.set_defaults(command=_rollouts)


def _rollouts(options: argparse.Namespace) -> None:
    run = load_run(options.run_dir)
    steps = recorded_steps(options.run_dir)
    if not steps:
        every = run.number("logging.rollouts_every_steps", 0)
        when = f"{every:g} records every step that it divides" if every else "0 records none"
        raise UserError(f"{options.run_dir}: no rollouts are recorded: logging.rollouts_every_steps={when}")
    step = steps[-1] if options.step is None else options.step
    if step not in steps:
        raise UserError(f"{options.run_dir}: no rollouts of step {step}; there are {', '.join(map(str, steps[-10:]))}")
    run = run.at(step)
    path = rollouts_path(options.run_dir, step)
    console = Console(highlight=False)
    view = view_step(
        read_rollouts(path),
        _tokenizer(options.tokenizer, run),
        _reader(run, console),
        tau=_tau(run),
        excerpt=Excerpt(options.prompt, options.prompts, options.max_tokens),
    )
    if options.html is None:
        show(view, console)
        return
    page = write_page(options.html, rollouts_page(view, title=f"{run.name}, step {step}", path=path))
    console.print(printable(f"rollouts: {page}"), markup=False, soft_wrap=True)


def _tokenizer(given: Path | None, run: Run) -> Any:
    configured = run.setting("model.hf_dir")
    if given is None and not isinstance(configured, str):
        raise UserError(f"{run.path}: its config.yaml names no model.hf_dir; give a tokenizer with --tokenizer DIR")
    try:
        return load_tokenizer(given or Path(configured))
    except UserError as error:
        raise UserError(f"{error}; --tokenizer DIR takes another one") from error


def _reader(run: Run, console: Console) -> Reader:
    """Function that reads answers as the run's verifier does; if it cannot be built, one that finds no answer."""
    answer, pattern = (run.setting(f"reward.{key}") for key in ("answer", "answer_pattern"))
    try:
        reward = RewardConfig(answer=None if answer is None else str(answer), answer_pattern=str(pattern or ""))
        return build_reader(str(run.setting("reward.verifier", "math")), reward)
    except UserError as error:
        console.print(printable(f"answers are not read: {error}"), style="yellow", markup=False, soft_wrap=True)
        return lambda response: None


def show(view: StepView, console: Console) -> None:
    """Print a step: background by entropy, green and red underlines where the control acts on A > 0 and A < 0."""
    alpha = "" if view.alpha is None else f", alpha {view.alpha:+.4f}"
    tau = "" if view.tau is None else f", tau {view.tau:g}"
    console.print(f"step {view.step}: {len(view.groups)} of {view.prompts} prompts{alpha}{tau}", style="bold")
    legend = Text("background: entropy, up to ")
    legend.append(f"{view.entropy_scale:.3g} nats", Style(bgcolor=_colour(1.0), color="white"))
    if view.tau is not None:
        legend.append("; the control acts on tokens with ")
        legend.append("A > 0", Style(underline=True, color="green")).append(" and ")
        legend.append("A < 0", Style(underline=True, color="red"))
    console.print(legend)
    for group in view.groups:
        console.rule(f"prompt {group.index}")
        console.print(Text(printable(shortened(group.prompt, 4000)), style="dim"))
        console.print(Text(printable(shortened(f"ground truth: {group.ground_truth}", 1000))))
        for response in group.responses:
            console.print(_heading(response))
            console.print(_coloured(response, view.entropy_scale))


def _heading(response: ResponseView) -> Text:
    trajectory, reward = response.recorded.trajectory, response.recorded.reward
    text = Text(f"\n[{trajectory.sample_index}] ")
    text.append(f"reward {reward.value:g}", "bold green" if reward.correct else "bold red")
    answer = "none" if response.answer is None else printable(shortened(response.answer, 200))
    # An environment judges a conversation, and reads no answer of it.
    judged = f"conversation ended: {trajectory.ending}" if trajectory.ending else f"answer read: {answer}"
    text.append(f"  {judged}  A {response.advantage:+.3f}  {trajectory.response_length} tokens")
    text.append(f"  entropy {response.mean_entropy:.3f}")
    if by_turn := response.turn_entropies:
        text.append(f" (by turn {' '.join(f'{entropy:.3f}' for entropy in by_turn)})")
    if trajectory.finish_reason == "length":
        text.append("  cut off at the limit")
    if reward.status != "ok":
        text.append(printable(f"  verifier: {reward.status}"), "bold yellow")
    return text


def _coloured(response: ResponseView, scale: float) -> Text:
    text = Text()
    for position, token in enumerate(response.tokens):
        if response.hidden and position == response.cut:
            text.append(f"[... {response.hidden} tokens ...]", "dim italic")
        if token.given:
            text.append(printable(token.text), _GIVEN)
            continue
        share = min(token.entropy / scale, 1.0)
        shaded = share >= _LEAST_SHADE
        style = Style(
            bgcolor=_colour(share) if shaded else None,
            color=_TOUCH_COLOURS.get(token.touch, "white" if shaded else None),
            underline=token.touch != "",
        )
        text.append(printable(token.text), style)
    return text


def _colour(share: float) -> str:
    """Background for a share of the strongest entropy: from nearly black to orange, for white text."""
    red, green, blue = (round(40 + share * (channel - 40)) for channel in (170, 95, 10))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _tau(run: Run) -> float | None:
    # alpha acts on tokens with pi > tau; other controllers know no tau.
    if not controller_entry(str(run.setting("entropy_control.controller", "pi"))).steers_alpha:
        return None
    return run.number("entropy_control.tau", 0.95)
