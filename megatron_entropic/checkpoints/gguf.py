"""GGUF files, in which small machines hold models, to Hugging Face directories with the weights dequantised.

FILE.gguf --transformers (gguf_file=)--> configuration, weights, tokenizer, chat template --> HF_DIR

What a quantised weight stands for is exact in float32, so that nothing is lost beyond what quantising lost before.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_entropic.errors import UserError
from megatron_entropic.files.atomic import appears_when_complete, output_problems
from megatron_entropic.models.dimensions import read_dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGES = ("gguf", "accelerate")
_SHARD_SIZE = "5GB"
_PARTS_KEY = "split.count"
# What the comparison reads: words, digits, other scripts, and the template's tokens where there is a template.
_TEXT = "Ada has 17 apples and 25 pears.\n12 + 7 =\n\td\u00e9j\u00e0 vu, \u65e5\u672c\u8a9e, x**2 - 3*x;"


@dataclass(frozen=True)
class GgufDifference:
    """Differences between a directory and the GGUF file, both read by transformers."""

    tensors: int
    """Number of tensors compared."""
    differing: tuple[str, ...]
    """Tensors of which any bit differs, and names that one side lacks."""
    logits: float
    """Largest absolute difference of two logits."""
    tokens_agree: bool
    """Whether texts become the same token ids, and the chat templates are equal."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and self.logits == 0 and self.tokens_agree


def gguf_to_hf(gguf_file: Path, output_dir: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a GGUF file as a Hugging Face directory, which appears when it is complete.

    The whole model is held in memory.

    Raises:
        UserError: gguf or accelerate is missing, the file cannot be read or is one part of several, transformers does
            not know its architecture or this project does not train it, the output exists, or the disk is too small.
    """
    values = _check_file(gguf_file)
    if problems := output_problems(output_dir, values * dtype.itemsize):
        raise UserError("\n".join(problems))
    model, tokenizer = _load(gguf_file, dtype)
    with appears_when_complete(output_dir) as partial:
        _save(model, partial)
        tokenizer.save_pretrained(partial)
        # A model that could be read and not be trained would be found out at the start of a run, or never.
        read_dimensions(partial)


def compare_with_gguf(gguf_file: Path, hf_dir: Path) -> GgufDifference:
    """Compare a directory with the GGUF file in the directory's dtype: parameters, logits and tokens.

    Raises:
        UserError: one of the two cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_file(gguf_file)
    read_dimensions(hf_dir)
    found = AutoModelForCausalLM.from_pretrained(hf_dir, dtype="auto", local_files_only=True).eval()
    found_tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    expected, tokenizer = _load(gguf_file, found.dtype)
    ours, theirs = found.state_dict(), expected.state_dict()
    names = sorted(ours.keys() | theirs.keys())
    differing = [name for name in names if not _same(ours.get(name), theirs.get(name))]
    ids = [one.encode(_TEXT) for one in (tokenizer, found_tokenizer)]
    with torch.no_grad():
        logits = [model(torch.tensor(ids[:1])).logits for model in (expected, found)]
    return GgufDifference(
        tensors=len(names),
        differing=tuple(differing),
        logits=float((logits[0] - logits[1]).abs().max()),
        tokens_agree=ids[0] == ids[1] and tokenizer.chat_template == found_tokenizer.chat_template,
    )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _load(gguf_file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, as transformers reads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **arguments)
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=dtype, **arguments)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{gguf_file}: transformers cannot read this model: {error}") from error
    return model.eval(), tokenizer


def _save(model: PreTrainedModel, output_dir: Path) -> None:
    # The loaded object counts as quantised and refuses to be saved, so a fresh one takes over its tensors.
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.dtype = model.dtype
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(output_dir, max_shard_size=_SHARD_SIZE)


def _check_file(gguf_file: Path) -> int:
    """Number of values of all tensors of a file that can be read.

    Raises:
        UserError: a package is missing, or the file is not there, no GGUF, cut off, or one part of several.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"reading GGUF needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
            "install the extra, pip install 'megatron_entropic[gguf]'"
        )
    if not gguf_file.is_file():
        raise UserError(f"{gguf_file}: no such file; expected one file in GGUF, usually NAME.gguf")
    import gguf

    try:
        reader = gguf.GGUFReader(gguf_file)
        parts = reader.fields.get(_PARTS_KEY)
        count = 1 if parts is None else int(parts.contents())
    # Beyond ValueError it stumbles over damaged lengths and offsets in whatever numpy raises for them.
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{gguf_file}: cannot be read as GGUF: {type(error).__name__}: {error}") from error
    if count > 1:
        raise UserError(
            f"{gguf_file}: is one of {count} parts of a model, and transformers reads single files: join them first "
            "(llama.cpp's `llama-gguf-split --merge FIRST_PART OUTPUT`)"
        )
    return sum(int(tensor.n_elements) for tensor in reader.tensors)
