"""The prompts of a run: read, checked, filtered and tokenised before anything is allocated.

    rows --> malformed? --> too long? --> copies, benchmark problems, pass rates --> order of (seed, position)

Three layouts are understood without any setting, in parquet, JSON lines or a saved `datasets` directory:
- verl: `prompt` (a list of messages, or a string), `reward_model.ground_truth`, and optionally `data_source` and
  `extra_info`;
- plain: `problem` (or `question`) and `answer` (or `ground_truth`);
- IFEval: `prompt`, `instruction_id_list` and `kwargs`.
`data.prompt_key` and `data.answer_key` name other columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data.filters import DataReport, find_duplicates, find_overlap, read_pass_rates, recorded_form
from megatron_entropic.data.order import Arrangement, EpochOrder, MixedOrder, as_stored, easy_to_hard, shuffled
from megatron_entropic.data.prompts import PromptForm, lookup, problem_text, read_truth
from megatron_entropic.data.rows import Row, RowProblems, read_rows
from megatron_entropic.data.tokenizer import RenderedPrompt, Tokenizer, appended_tokens, template_digest, unknown_to
from megatron_entropic.errors import UserError
from megatron_entropic.types import Task

TruthCheck = Callable[[list[Any]], list[str | None]]
"""Function of ground truths that returns words for why each cannot be used, None where it can."""

_ROUNDS = 1000
"""Upper limit of how often one step asks for replacements; it keeps the seeds of steps apart."""


class TaskDataset:
    """All tasks in memory; `at_step` says which of them a step takes."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        check_truths: TruthCheck | None = None,
        benchmarks: Mapping[str, Sequence[str]] | None = None,
        other_columns: bool = False,
    ):
        """Read every file, tokenise every prompt and check all of them.

        Args:
            config: the files, their columns, and what is left out.
            seed: seed of the order.
            check_truths: the verifier's opinion of the ground truths.
            benchmarks: problems of each benchmark, to look for among the training problems.
            other_columns: whether a file without any `answer_key` is read as if the key were not set.

        Raises:
            UserError: listing every file and row that cannot be used: no such file, damaged files, missing columns,
                values of the wrong type, empty prompts, ground truths that the verifier cannot read, prompts longer
                than `max_prompt_tokens` (unless `too_long: drop`); or nothing left after filtering. With
                `skip_malformed` findings about rows are no error; `report` counts them.
        """
        self.report = DataReport()
        self.tokenizer = tokenizer
        if not config.apply_chat_template and (appended := appended_tokens(tokenizer)):
            self.report.left_off = str(tokenizer.decode(appended))
        self._config, self._seed, self._other_columns = config, seed, other_columns
        self._tokenizer = tokenizer
        problems = RowProblems()
        self._read(tokenizer, check_truths, problems)
        if config.skip_malformed:
            self.report.note_skipped(problems)
        self._filter(benchmarks or {}, problems)
        if not self._tasks and not problems.messages and (config.skip_malformed or not problems.row_count):
            problems.add("no prompt is left\n    " + "\n    ".join(self.report.lines()))
        problems.raise_if_any("the training data cannot be used", skip_rows=config.skip_malformed)
        self.report.kept = len(self._tasks)
        self._order = self._make_order(self._seed, self._arrange)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, position: int) -> Task:
        return self._tasks[position]

    @property
    def dropped(self) -> int:
        """Number of prompts left out for their length."""
        return len(self.report.too_long)

    @property
    def tasks(self) -> list[Task]:
        """Every task once, in the order of the files."""
        return list(self._tasks)

    @property
    def problems(self) -> list[str]:
        """Text of the user in each of `tasks`, without templates, system prompt and suffix."""
        return list(self._problems)

    def at_step(self, step: int, count: int) -> list[Task]:
        """The `count` tasks of `step` (counted from 1), every step of the run taking as many.

        A pure function of the files, the seed and the arguments: a resumed run continues with the same prompts.
        """
        assert step >= 1, "steps are counted from 1"
        return [self._tasks[row] for row in self._order.rows((step - 1) * count, count)]

    def replacements(self, step: int, earlier: int, count: int, seen: Set[int]) -> list[Task]:
        """Tasks for a step beside those of `at_step`, from a shuffled order of its own.

        A pure function of files, seed and arguments, as `at_step`. Fewer than `count` if the data set has no more.

        Args:
            step: the step, counted from 1.
            earlier: how often the step has asked before.
            count: number of tasks that are wanted.
            seen: indices of tasks that the step has had.
        """
        order = self._make_order(self._seed + (step * _ROUNDS + earlier << 32), lambda rows: shuffled(len(rows)))
        found: dict[int, Task] = {}
        for row in order.rows(0, len(self._tasks)):
            task = self._tasks[row]
            if len(found) < count and task.index not in seen:
                found[task.index] = task
        return list(found.values())

    def _read(self, tokenizer: Tokenizer, check_truths: TruthCheck | None, problems: RowProblems) -> None:
        """Fill tasks, problems and the number of each one's file with every usable row of bearable length."""
        config, form = self._config, PromptForm.of(self._config)
        usable: list[tuple[Row, int, int, list[dict[str, Any]], Any]] = []
        index = 0
        for file_number, file in enumerate(config.train_files):
            rows = read_rows([file], problems)
            self.report.rows[file] = len(rows)
            answer_key = config.answer_key
            if answer_key and self._other_columns and all(lookup(row.values, answer_key) is None for row in rows):
                answer_key = None
            for row in rows:
                found = _messages_and_truth(row, form, answer_key, problems)
                if found is not None:
                    usable.append((row, index, file_number, *found))
                index += 1
        prompts = _rendered([messages for *_, messages, _ in usable], tokenizer, form, problems)
        reasons = check_truths([truth for *_, truth in usable]) if check_truths else [None] * len(usable)
        self._tasks: list[Task] = []
        self._problems: list[str] = []
        self._file_numbers: list[int] = []
        for (row, index, file_number, messages, truth), prompt, reason in zip(usable, prompts, reasons, strict=True):
            ids = prompt.tokens
            if reason is not None:
                problems.add_row(row, "the verifier cannot use the ground truth", reason)
            if prompt.problem:
                problems.add_row(row, f"the prompt cannot be used: {prompt.problem}", prompt.detail)
            elif reason is not None:
                continue
            elif not ids:
                problems.add_row(row, "the prompt has no tokens")
            elif len(ids) <= config.max_prompt_tokens:
                self._tasks.append(_task(index, row, prompt.text, ids, truth))
                if unknown_to(tokenizer, prompt):
                    self.report.unknown.append(row.place)
                self._problems.append(problem_text(messages))
                self._file_numbers.append(file_number)
            elif config.too_long == "drop":
                self.report.too_long.append((row.place, len(ids)))
            else:
                limit = f"more than data.max_prompt_tokens={config.max_prompt_tokens}"
                problems.add_row(row, limit, f"{len(ids)} tokens")

    def _filter(self, benchmarks: Mapping[str, Sequence[str]], problems: RowProblems) -> None:
        """Look for copies, benchmark problems and recorded pass rates; leave out those that the configuration says."""
        config = self._config
        duplicates = find_duplicates(self._problems, [task.ground_truth for task in self._tasks])
        overlaps = find_overlap(self._problems, benchmarks, config.overlap_words)
        places = [f"prompt {task.index} of {task.data_source}" for task in self._tasks]
        self.report.note_copies(config, places, duplicates, overlaps)
        out: set[int] = set()
        if config.duplicates == "drop":
            out |= set(duplicates.positions)
        if config.benchmark_overlap == "drop":
            out |= set().union(*(overlap.positions for overlap in overlaps.values()))
        rates = self._recorded_pass_rates(problems)
        outside = {i for i, rate in rates.items() if not config.pass_rate_min <= rate <= config.pass_rate_max}
        if config.pass_rates is not None:
            self.report.pass_rates = (len(rates), len(outside))
        kept = [position for position in range(len(self._tasks)) if position not in out | outside]
        self._tasks = [self._tasks[position] for position in kept]
        self._problems = [self._problems[position] for position in kept]
        self._file_numbers = [self._file_numbers[position] for position in kept]
        self._pass_rates = [rates.get(position) for position in kept]

    def _recorded_pass_rates(self, problems: RowProblems) -> dict[int, float]:
        """Pass rates of the prompts that have a recorded one, by position."""
        file = self._config.pass_rates
        if file is None:
            return {}
        try:
            rates = read_pass_rates(file)
        except ValueError as error:
            problems.add(f"data.pass_rates: {error}")
            return {}
        known = {i: rates[task.text] for i, task in enumerate(self._tasks) if task.text in rates}
        changed = self._changes_since(file)
        because = f": recorded with other prompts, since {', '.join(changed)} changed" if changed else ""
        if self._tasks and not known:
            problems.add(
                f"data.pass_rates: {file}: none of its prompts is one of the training prompts, as the chat template, "
                f"system prompt and suffix make them{because}"
            )
        self.report.pass_rates_because = because
        return known

    def _changes_since(self, file: Path) -> list[str]:
        """Settings and template of prompts that are not as they were when the pass rates were recorded."""
        try:
            before = recorded_form(file)
        except UserError:
            # Responses of another program's making have no settings; their prompts are compared all the same.
            return []
        form = self._config.model_dump(mode="json")
        template = template_digest(self._tokenizer) if self._config.apply_chat_template else None
        now = {key: template if key == "the chat template" else form[key.removeprefix("data.")] for key in before}
        return [
            key if key == "the chat template" else f"{key} (was {before[key]!r})"
            for key in before
            if before[key] != now[key]
        ]

    def _arrange(self, rows: Sequence[int]) -> Arrangement:
        """Order of some of the prompts within an epoch, as `data.order` says."""
        match self._config.order:
            case "shuffled":
                return shuffled(len(rows))
            case "as_stored":
                return as_stored(len(rows))
            case "easy_to_hard":
                return easy_to_hard([self._pass_rates[row] for row in rows], self._config.order_blur)

    def _make_order(self, seed: int, arrange: Callable[[Sequence[int]], Arrangement]) -> EpochOrder | MixedOrder:
        config, size = self._config, len(self._tasks)
        if config.file_weights is None:
            return EpochOrder(size, arrange(range(size)), seed=seed)
        members: list[list[int]] = [[] for _ in config.train_files]
        for position, file_number in enumerate(self._file_numbers):
            members[file_number].append(position)
        empty = [str(file) for file, rows in zip(config.train_files, members, strict=True) if not rows]
        if empty:
            raise UserError(f"data.file_weights: no prompt is left of {', '.join(empty)}")
        return MixedOrder(members, config.file_weights, arrange, seed=seed)


def _messages_and_truth(
    row: Row, form: PromptForm, answer_key: str | None, problems: RowProblems
) -> tuple[list[dict[str, Any]], Any] | None:
    """Messages and ground truth of a row, or None with everything that is wrong with either noted."""
    messages: list[dict[str, Any]] | None = None
    truth: Any = None
    try:
        messages = form.messages(row)
    except ValueError as error:
        problems.add_row(row, str(error))
    try:
        truth = read_truth(row, answer_key)
    except ValueError as error:
        problems.add_row(row, str(error))
    return None if messages is None or truth is None else (messages, truth)


def _rendered(
    prompts: list[list[dict[str, Any]]], tokenizer: Tokenizer, form: PromptForm, problems: RowProblems
) -> list[RenderedPrompt]:
    """Texts and tokens of the prompts. A tokenizer without a template is one more problem and hides no others."""
    try:
        return form.render(prompts, tokenizer)
    except ValueError as error:
        problems.add(str(error))
        return [RenderedPrompt(tokens=[0])] * len(prompts)


def _task(index: int, row: Row, text: str, tokens: list[int], truth: Any) -> Task:
    extra, source = row.values.get("extra_info"), str(row.values.get("data_source") or Path(row.file).stem)
    return Task(
        index=index,
        tokens=np.array(tokens, np.int32),
        text=text,
        ground_truth=truth,
        # Nothing but a label: half of a character becomes its escape, since it goes into files that hold UTF-8.
        data_source=source.encode("utf-8", "backslashreplace").decode(),
        extra_info=extra if isinstance(extra, dict) else {},
    )
