"""Some responses of each step in samples.jsonl, for people to read."""

from __future__ import annotations

from pathlib import Path

from megatron_entropic.files.jsonl import JsonLinesWriter
from megatron_entropic.types import Sample

SAMPLES_FILE = "samples.jsonl"


class SampleLog:
    """Writes the first `samples_per_step` prompts' first responses of each step; 0 writes nothing."""

    def __init__(self, output_dir: Path, samples_per_step: int):
        self._samples_per_step = samples_per_step
        self._lines = JsonLinesWriter(output_dir / SAMPLES_FILE) if samples_per_step else None

    def truncate_after(self, step: int) -> None:
        """Forget every step after `step`, as `MetricsWriter.truncate_after` does."""
        if self._lines:
            self._lines.truncate_after(step)

    def write(self, step: int, samples: list[Sample]) -> None:
        """Record one step. Different prompts are taken where there are enough of them."""
        if self._lines is None:
            return
        chosen = sorted(samples, key=lambda sample: sample.sample_index)[: self._samples_per_step]
        self._lines.append_all([_row(step, sample) for sample in chosen])

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()


def _row(step: int, sample: Sample) -> dict[str, object]:
    return {
        "step": step,
        "prompt_index": sample.prompt.index,
        "sample_index": sample.sample_index,
        "weights_version": sample.weights_version,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "response_tokens": len(sample.response_tokens),
        "reward": sample.reward,
        "verifier_status": sample.verifier_status,
        "finish_reason": sample.finish_reason,
    }
