"""What the small generated tasks share: one token a character, a tiny random Qwen3, prompt files, and the manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import PreTrainedTokenizerFast

# The end is the only special token: any other is seen by the verifier, so none can pass unnoticed in a right answer.
END, UNKNOWN = "$", "?"
MANIFEST = "manifest.json"
EMBEDDING_STD = 0.05

Rows = TypeVar("Rows", bound="DataclassInstance")


def prepare_task(
    output: Path,
    seed: int,
    sizes: Rows,
    source: str,
    write_data: Callable[[Path, int, Rows], None],
    vocabulary: str,
    model: Mapping[str, Any],
) -> bool:
    """Write data and model of a task below `output`; returns False if they are complete already.

    The manifest is written last, so an interrupted call is repeated as a whole.

    Args:
        output: folder; created if missing.
        seed: of data and weights.
        sizes: dataclass with the rows of each file.
        source: `__file__` of the task's script, of which the files are a function.
        write_data: writes the data files.
        vocabulary, model: as of `write_model`.
    """
    digest = hashlib.sha256()
    for script in (source, __file__):
        digest.update(Path(script).read_bytes())
    settings = {"seed": seed, "rows": asdict(sizes), "script_sha256": digest.hexdigest()}
    manifest = json.dumps(settings, indent=2) + "\n"
    written = output / MANIFEST
    if written.is_file() and written.read_text(encoding="utf-8") == manifest:
        return False
    output.mkdir(parents=True, exist_ok=True)
    written.unlink(missing_ok=True)
    write_data(output, seed, sizes)
    write_model(output / "model", vocabulary, model, seed)
    written.write_text(manifest, encoding="utf-8")
    return True


def write_files(output: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One parquet file for each name."""
    import pyarrow
    import pyarrow.parquet

    for name, rows in files.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), output / f"{name}.parquet")


def verl_row(task: str, prompt: str, ground_truth: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
    """One row of a prompt file, in verl's column layout."""
    return {
        "data_source": task,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": json.dumps(ground_truth)},
        "extra_info": {"split": split, "index": index},
    }


def tokenizer(vocabulary: str, max_tokens: int) -> PreTrainedTokenizerFast:
    """One token a character of `vocabulary`, which contains END and UNKNOWN."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({character: i for i, character in enumerate(vocabulary)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
    # Messages are simply joined: a prompt reads the same with and without the template.
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return wrapped


def write_model(directory: Path, vocabulary: str, sizes: Mapping[str, Any], seed: int) -> None:
    """A Hugging Face directory of a Qwen3 with random weights, and its tokenizer.

    Args:
        sizes: arguments of `Qwen3Config` beside those of vocabulary, rotary embedding and dtype.
        seed: of the weights.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        eos_token_id=vocabulary.index(END),
        pad_token_id=vocabulary.index(END),
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        dtype="float32",
        **sizes,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    model.save_pretrained(directory)
    tokenizer(vocabulary, sizes["max_position_embeddings"]).save_pretrained(directory)


def command_line(task: str, prepare: Callable[[Path, int], bool]) -> None:
    """`--output` and `--seed` for a script that generates a task; says whether `prepare` had to write anything."""
    parser = argparse.ArgumentParser(description=f"Generate data, tokenizer and model of the {task} task.")
    parser.add_argument("--output", type=Path, default=Path("data") / task)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    verb = "written to" if prepare(options.output, options.seed) else "already in"
    sys.stdout.write(f"{task} data and model are {verb} {options.output}\n")
