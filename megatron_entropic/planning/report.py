"""A plan as tables: rich ones on a terminal, plain columns elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_entropic.config.run import Config
from megatron_entropic.planning.communication import Traffic
from megatron_entropic.planning.failures import checkpoints
from megatron_entropic.planning.generation import engine_load
from megatron_entropic.planning.memory import (
    GIB,
    MEMORY_KINDS,
    driver_host_bytes,
    sequences_that_fit,
    teacher_host_bytes,
)
from megatron_entropic.planning.plan import Numbers, Plan, gpus_in_use, gpus_of
from megatron_entropic.planning.roofline import StepTime
from megatron_entropic.planning.schedule import MEAN_PROMPT_SHARE, MEAN_RESPONSE_SHARE, Schedule, in_flight
from megatron_entropic.planning.suggest import Suggestion, layout_name

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """One table: the first column is text, the others are numbers if `header` names them and sentences if not."""

    title: str
    header: Row
    """Names of the columns; empty for tables of names and sentences."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def sections(plan: Plan, lags: Sequence[int] = ()) -> Iterator[Section]:
    """All tables of a plan, in the order in which a reader needs them; with the step at each of some `lags`."""
    yield _subject(plan)
    if plan.numbers is None:
        return
    yield _parameters(plan, plan.numbers)
    yield _memory(plan, plan.numbers)
    yield _rollout(plan, plan.numbers)
    yield _schedule(plan, plan.numbers.step.schedule)
    yield _traffic(plan.numbers.traffic)
    yield _publication(plan.numbers)
    yield _time(plan, plan.numbers)
    yield _checkpoints(plan, plan.numbers)
    if plan.config.rollout.lag or lags:
        yield _ahead(plan, plan.numbers, lags or (0, plan.config.rollout.lag))
    yield _assumptions(plan)


def suggestion_section(suggestions: Sequence[Suggestion], gpus: int, reasons: Sequence[str] = ()) -> Section:
    """The best layouts, with the overrides that select each; without any, the reasons."""
    rows = tuple(
        (
            str(place),
            layout_name(suggestion.plan.config.policy),
            f"{suggestion.plan.config.rollout.engines} x {suggestion.plan.config.rollout.tensor_parallel}",
            suggestion.plan.config.policy.recompute,
            f"{suggestion.time_s:,.0f}",
            _gb(suggestion.memory_bytes),
        )
        for place, suggestion in enumerate(suggestions, start=1)
    )
    notes = tuple(f"{place}: {' '.join(s.overrides)}" for place, s in enumerate(suggestions, start=1))
    header = ("", "policy", "engines", "recompute", "s per step", "GB on the fullest GPU")
    if not rows:
        notes = tuple(f"none: {reason}" for reason in reasons)
    return Section(f"fastest layouts that fit on {gpus} GPUs", header, rows, notes)


def show(parts: Sequence[Section], console: Console) -> None:
    """Write tables to a console: drawn ones if it is a terminal, else plain text of any width."""
    for part in parts:
        if console.is_terminal:
            console.print(escape(part.title), style="bold", soft_wrap=True)
            console.print(_drawn(part))
            for note in part.notes:
                console.print(escape(note), style="dim", highlight=False, soft_wrap=True)
        else:
            console.print(plain_text(part), markup=False, highlight=False, soft_wrap=True)


def plain_text(section: Section) -> str:
    """A section as lines of text, columns aligned, with an empty line behind."""
    rows = [section.header, *section.rows] if section.header else list(section.rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = [section.title]
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 or not section.header else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    lines += [f"  {note}" for note in section.notes]
    return "\n".join(lines) + "\n"


def _drawn(section: Section) -> Table:
    table = Table(show_header=bool(section.header), box=SIMPLE)
    for column, name in enumerate(section.header or section.rows[0]):
        numeric = bool(section.header) and column > 0
        table.add_column(escape(name) if section.header else "", justify="right" if numeric else "left")
    for row in section.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _subject(plan: Plan) -> Section:
    config, model = plan.config, plan.table.model
    policy_gpus, rollout_gpus = gpus_of(config)
    size = f"{plan.table.elements:,} parameters"
    if model.experts is not None:
        size += f", {plan.table.active_elements:,} active for a token ({model.experts.count} experts)"
    shared = "of the same GPUs" if config.cluster.colocate else "GPUs"
    rows = [
        ("model", f"{model.name}, {size}, {config.model.dtype}"),
        ("dimensions from", model.source.rpartition("megatron_entropic/")[2]),
        ("policy", f"{policy_gpus} GPUs: {layout_name(config.policy)}"),
        ("rollout", f"{rollout_gpus} {shared}: {config.rollout.engines} engines of {config.rollout.tensor_parallel}"),
        ("GPUs", f"{plan.gpus} of {plan.gpu_memory_gb:g} GB"),
    ]
    return Section(f"plan of {config.run.name}", (), tuple(rows))


def _parameters(plan: Plan, numbers: Numbers) -> Section:
    rows = tuple(
        (
            str(stage.stage),
            str(stage.layers),
            f"{stage.elements_of('embedding'):,}",
            f"{stage.elements_of('layers'):,}",
            f"{stage.elements_of('output'):,}",
            f"{stage.elements:,}",
        )
        for stage in numbers.stages
    )
    dimensions, ranks = plan.table.model.dimensions, plan.config.policy.tensor_parallel
    padded = dimensions.padded_vocab_size(ranks)
    notes: tuple[str, ...] = ()
    if (lora := plan.config.policy.lora).enabled:
        trained = plan.table.trained(lora).elements
        notes = (f"trained: {trained:,} parameters of adapters of rank {lora.rank}, beside these",)
    note = f"vocabulary {dimensions.vocab_size:,} padded to {padded:,} rows, {padded // ranks:,} on each tensor rank"
    header = ("stage", "layers", "embedding", "in layers", "norm and output", "on each GPU")
    return Section("parameters of each policy GPU", header, rows, (note, *notes))


def _memory(plan: Plan, numbers: Numbers) -> Section:
    kinds = [kind for kind in MEMORY_KINDS if any(getattr(stage, kind) for stage in numbers.memory)]
    rows = tuple(
        (
            str(stage.stage),
            *(_gb(getattr(stage, kind)) for kind in kinds),
            _gb(stage.total),
            str(
                in_flight(
                    plan.config.policy.pipeline_parallel,
                    stage.stage,
                    numbers.step.schedule.microbatches_at_most,
                    plan.config.policy.virtual_pipeline_parallel,
                )
            ),
        )
        for stage in numbers.memory
    )
    policy, schedule = plan.config.policy, numbers.step.schedule
    notes: tuple[str, ...] = (
        f"activations of micro-batches of {schedule.largest_tokens:,} tokens, recompute {policy.recompute}, sequence "
        f"parallel {str(policy.sequence_parallel).lower()}; output head {plan.config.output_head}",
        f"host memory of a checkpoint: {_gb(numbers.checkpoint_host_bytes)} GB on the fullest node of "
        f"{plan.hardware.gpus_per_node} policy GPUs, checkpoint.format {plan.config.checkpoint.format}",
    )
    driver, store = driver_host_bytes(numbers.step)
    notes += (
        f"host memory of a rollout's {schedule.responses:,} responses: {_gb(driver)} GB of the driver, and at most "
        f"{_gb(store)} GB of Ray's object store on its node",
    )
    if states := teacher_host_bytes(numbers.step):
        teacher = numbers.step.frozen["teacher"].model.name
        notes += (f"host memory of hidden states of the teacher {teacher}: {_gb(states)} GB on each last-stage rank",)
    return Section("GB on each policy GPU", ("stage", *kinds, "total", "in flight"), rows, notes)


def _rollout(plan: Plan, numbers: Numbers) -> Section:
    memory, schedule, config = numbers.rollout, numbers.step.schedule, plan.config
    long, mean = (sequences_that_fit(memory, n) for n in (config.max_sequence_tokens, schedule.mean_tokens))
    rows = (
        ("weights", f"{_gb(memory.weights)} GB"),
        ("workspace", f"{_gb(memory.workspace)} GB"),
        (
            "KV cache",
            f"{_gb(max(0, memory.kv_cache))} GB = {memory.tokens:,} tokens of {memory.kv_bytes_per_token:,} B",
        ),
        (
            "sequences at once",
            f"{long:,} of {config.max_sequence_tokens:,} tokens, {mean:,} of {schedule.mean_tokens:,.0f}; "
            f"rollout.max_concurrent_sequences={config.rollout.max_concurrent_sequences:,}",
        ),
    )
    return Section("each rollout GPU", (), rows)


def _schedule(plan: Plan, schedule: Schedule) -> Section:
    stages, chunks = plan.config.policy.pipeline_parallel, plan.config.policy.virtual_pipeline_parallel
    turns = f"{chunks} x {schedule.microbatches}" if chunks > 1 else f"{schedule.microbatches}"
    rows = (
        (
            "optimizer steps",
            f"{schedule.optimizer_steps}, of {schedule.responses // schedule.optimizer_steps:,} responses",
        ),
        (
            "micro-batches",
            f"{schedule.microbatches:,} of about {schedule.tokens:,.0f} tokens on each replica, at most "
            f"{schedule.microbatches_at_most:,}",
        ),
        (
            "pipeline bubble",
            f"({stages} - 1) / ({turns} + {stages} - 1) = {100 * schedule.bubble_fraction:.1f} %",
        ),
    )
    lengths = (
        f"{schedule.mean_prompt_tokens:,.0f} + {schedule.mean_response_tokens:,.0f} tokens on average, standard "
        f"deviation of responses {schedule.response_deviation:,.0f}"
    )
    note = (
        f"given: {lengths}"
        if plan.lengths_given
        else f"assumed: prompts of {MEAN_PROMPT_SHARE:g} and responses of {MEAN_RESPONSE_SHARE:g} of their limits, "
        f"{lengths}; --lengths gives others"
    )
    return Section("one training step", (), rows, (note,))


def _traffic(traffic: Sequence[Traffic]) -> Section:
    rows = tuple(
        (
            f"{entry.kind}: {entry.operation}",
            str(entry.ranks),
            "network" if entry.across_nodes else "node",
            f"{entry.count:,}",
            f"{entry.sent_bytes / 1e9:,.1f}",
        )
        for entry in traffic
    )
    header = ("", "ranks", "link", "messages", "10^9 B")
    notes = () if rows else ("one rank: nothing",)
    return Section("sent by the busiest policy GPU in one optimizer step", header, rows, notes)


def _publication(numbers: Numbers) -> Section:
    published = numbers.publication
    rows = (
        ("to each engine", f"{published.engine_bytes / 1e9:,.2f} x 10^9 B in {published.buckets} buckets"),
        ("collectives", f"{published.collectives} (gather over TP, send to stage 0, broadcast)"),
        ("gathered", f"{published.gathered_bytes / 1e9:,.2f} x 10^9 B sent by each GPU of the busiest stage"),
        ("forwarded", f"{published.forwarded_bytes / 1e9:,.2f} x 10^9 B from other stages to the first"),
    )
    return Section("publishing weights", (), rows)


def _time(plan: Plan, numbers: Numbers) -> Section:
    time = numbers.time
    phases = [
        ("rollout", time.rollout_s),
        ("  its tail", time.tail_s),
        ("score", time.score_s),
        ("update", time.update_s),
        ("publish", time.publish_s),
    ]
    if time.switch_s:
        phases.append(("switch", time.switch_s))
    rows = tuple((name, f"{seconds:,.1f}", f"{100 * seconds / time.total_s:.0f} %") for name, seconds in phases)
    total = ("total, lagging" if time.ahead else "total", f"{time.total_s:,.1f}", "")
    steps = plan.config.train.steps
    hours, used = time.total_s * steps / 3600, gpus_in_use(plan.config)
    notes = [f"{steps:,} steps: {hours:,.0f} hours, {hours * used:,.0f} GPU-hours, without evaluations and checkpoints"]
    if used < plan.gpus:
        notes.append(
            f"on {used} GPUs; {plan.gpus - used} of the {plan.gpus} would stand still, all are "
            f"{hours * plan.gpus:,.0f} GPU-hours"
        )
    if used > plan.gpus:
        notes.append(f"on {used} GPUs, as this layout needs them; --suggest lays it out on {plan.gpus}")
    notes += _slow_phases(plan.config, time)
    return Section("expected seconds of one training step", ("", "s", "share"), (*rows, total), tuple(notes))


def _checkpoints(plan: Plan, numbers: Numbers) -> Section:
    config, gpus = plan.config, gpus_in_use(plan.config)
    found = checkpoints(numbers.step, gpus, numbers.time.total_s)
    written = "in the background" if config.checkpoint.asynchronous else "while the run waits"
    rows = (
        ("size of a checkpoint", f"{_gb(found.size_bytes)} GB, written in {found.write_s:,.0f} s {written}"),
        ("the run waits", f"{found.blocked_s:,.1f} s"),
        ("a failure", f"every {found.hours_between_failures:,.0f} hours on {gpus} GPUs"),
        ("best interval", f"{found.best_every_steps:,} steps, for least time lost"),
        (
            "lost time",
            f"{100 * found.lost_share:.1f} % with checkpoint.every_steps={config.checkpoint.every_steps}, restarts not "
            "counted",
        ),
    )
    return Section("checkpoints and failures", (), rows)


def _slow_phases(config: Config, time: StepTime) -> list[str]:
    """Sentences on phases that their limits would end, or that are so close that an estimate cannot tell."""
    cluster = config.cluster
    limits = (
        ("rollout", time.rollout_s, "generate_timeout_s", cluster.generate_timeout_s),
        ("score", time.score_s, "score_timeout_s", cluster.score_timeout_s),
        ("update", time.update_s, "update_timeout_s", cluster.update_timeout_s),
        ("publish", time.publish_s, "publish_timeout_s", cluster.publish_timeout_s),
    )
    return [
        f"{phase}: {seconds:,.0f} s are more than half of cluster.{key}={limit:g}; raise it"
        for phase, seconds, key, limit in limits
        if seconds > limit / 2
    ]


def _ahead(plan: Plan, numbers: Numbers, lags: Sequence[int]) -> Section:
    config, time = plan.config, numbers.time
    load = engine_load(numbers.step, numbers.rollout)
    rows = []
    for lag in lags:
        found = time.with_lag(config, load, lag)
        shares = (f"{found.engines_busy:.0%}", f"{found.policy_busy:.0%}")
        rows.append((str(lag), f"{found.step_s:,.0f}", *shares, f"{found.mean_age:.2f}", str(found.oldest)))
    header = ("rollout.lag", "s per step", "engines at work", "policy at work", "mean age of a token", "oldest")
    notes = ("ages in weight versions; simulated with the lengths and times above",)
    return Section("rollouts that run ahead", header, tuple(rows), notes)


def _assumptions(plan: Plan) -> Section:
    return Section("assumed of the hardware", (), tuple(plan.hardware.rows()))


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.1f}"
