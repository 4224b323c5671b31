"""The tokenizer of a Hugging Face directory, and how a prompt becomes tokens with it.

messages --chat template--> text --tokenizer--> tokens: all of them in the embedding, none after the text's own
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError, missing_model

Tokenizer = Any
"""A transformers.PreTrainedTokenizerBase; not named here, so that importing this file stays quick."""

_NO_TEMPLATE = "data.apply_chat_template=true, but the tokenizer has no chat template"
_TEMPLATE_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken")


@dataclass(slots=True)
class RenderedPrompt:
    """A prompt as the model sees it, or the reason why it cannot be made."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    problem: str = ""
    """Words for what is wrong, the same for every prompt of which the same is wrong; empty if nothing is."""
    detail: str = ""


def load_tokenizer(hf_dir: Path) -> Tokenizer:
    """Load the tokenizer of a local directory; nothing is downloaded and no code of the directory is run.

    Raises:
        UserError: no tokenizer in it, an unreadable one, one that is code of its directory, or one without an
            end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not hf_dir.is_dir():
        raise UserError(missing_model(hf_dir))
    if own_class := _class_in_the_directory(hf_dir):
        raise UserError(
            f"{hf_dir}: its tokenizer {own_class} is Python code of that directory (tokenizer_config.json, auto_map), "
            "which is never run here: look at the code, load the tokenizer with transformers elsewhere, save it as a "
            "tokenizer.json, and take auto_map and tokenizer_class out of tokenizer_config.json"
        )
    try:
        # False and not None: with None transformers asks on a terminal whether it may run the directory's code.
        tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # A damaged tokenizer.json raises plain Exception in tokenizers.
        raise UserError(f"{hf_dir}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{hf_dir}: the tokenizer has no end-of-sequence token (eos_token), so no response could end")
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 over the tokenizer's files, without the chat template that `tokenizer_config.json` may hold."""
    directory, digest = Path(tokenizer.name_or_path), hashlib.sha256()
    for path in sorted({path for pattern in _TEMPLATE_FILES for path in directory.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        if path.name == "tokenizer_config.json":
            settings = json.loads(content)
            settings.pop("chat_template", None)
            content = json.dumps(settings, sort_keys=True).encode()
        digest.update(f"{path.name}/{len(content)}/".encode() + content)
    return digest.hexdigest()


def template_digest(tokenizer: Tokenizer) -> str | None:
    """SHA-256 of the chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode("utf-8", "backslashreplace")).hexdigest() if template else None


def embedding_rows(tokenizer: Tokenizer) -> int | None:
    """Rows of the embedding of the model beside the tokenizer; None where its directory does not say."""
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "config.json").read_text(encoding="utf-8"))
        rows = config.get("vocab_size")
    except (OSError, AttributeError, ValueError, RecursionError):
        # No model beside it, as in tests and tools; one that cannot be read is refused by whoever opens the model.
        return None
    return rows if type(rows) is int else None


def render_prompts(
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    tokenizer: Tokenizer,
    *,
    apply_chat_template: bool,
    template_date: datetime.date | None = None,
) -> list[RenderedPrompt]:
    """Make text and tokens of each prompt, a string or a list of messages with role and content.

    With the chat template a string is a single user message, and the text ends where the assistant begins. Without
    it the contents of the messages are joined by blank lines, and the tokenizer adds its own special tokens before
    them (a beginning-of-sequence token, where the model has one). What it would add behind them is left off: after an
    end-of-sequence token there is nothing to answer.

    Args:
        template_date: the day for chat templates that ask for it. None: such a template cannot be used, since the
            prompts of a run would depend on the day it was started.

    Raises:
        UserError: the chat template is asked for and the tokenizer has none.
    """
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError(_NO_TEMPLATE)
    rendered = [_text(prompt, tokenizer, apply_chat_template, template_date) for prompt in prompts]
    usable = [one for one in rendered if not one.problem]
    # The template writes the special tokens itself; adding them again would double the first one.
    encode(usable, tokenizer, special_tokens=not apply_chat_template)
    return rendered


def encode(texts: Sequence[RenderedPrompt], tokenizer: Tokenizer, *, special_tokens: bool) -> None:
    """Set the tokens, or the problem, of each text; `special_tokens` adds those that the tokenizer puts before it."""
    if not texts:
        return
    appended = len(appended_tokens(tokenizer)) if special_tokens else 0
    rows = embedding_rows(tokenizer)
    options = {"add_special_tokens": special_tokens, "return_attention_mask": False}
    try:
        found: list[Any] = list(tokenizer([one.text for one in texts], **options)["input_ids"])
    except Exception:  # noqa: BLE001  tokenizers raises plain Exception: which text it was shows one by one
        found = [_encoded(one.text, tokenizer, options) for one in texts]
    for one, ids in zip(texts, found, strict=True):
        if isinstance(ids, str):
            one.problem, one.detail = "the tokenizer cannot read it", ids
            continue
        one.tokens = ids[: len(ids) - appended]
        beyond = sorted({token for token in one.tokens if rows is not None and token >= rows})
        if beyond:
            one.problem = (
                f"a token is beyond the model's embedding of {rows} rows: the tokenizer got tokens that the model does "
                "not have (enlarge the embedding, or take them out of tokenizer.json)"
            )
            named = tokenizer.convert_ids_to_tokens(beyond[:3])
            one.detail = ", ".join(f"{token} {name!r}" for token, name in zip(beyond, named, strict=False))


def appended_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that the tokenizer puts behind every text by itself, such as an end-of-sequence token; mostly none."""
    try:
        plain, whole = (tokenizer("1", add_special_tokens=special)["input_ids"] for special in (False, True))
    except Exception:  # noqa: BLE001  a vocabulary without the digit: the texts themselves will tell
        return []
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[start + len(plain) :])
    return []


def unknown_to(tokenizer: Tokenizer, prompt: RenderedPrompt) -> bool:
    """Whether part of the prompt became the token for text that the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    return unknown is not None and unknown in prompt.tokens and str(tokenizer.unk_token) not in prompt.text


def lone_surrogate(values: Iterable[str]) -> str:
    """Half a character in one of the texts, with its place; empty if all of them are whole Unicode."""
    for text in values:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"\\u{ord(text[error.start]):04x} at character {error.start}"
    return ""


def _class_in_the_directory(hf_dir: Path) -> str:
    """Name of the tokenizer's class if only code of the directory defines it; empty otherwise.

    transformers would take the class of the model's family instead, which reads tokenizer.json in its own way.
    """
    import transformers

    try:
        settings = json.loads((hf_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        name, own = str(settings.get("tokenizer_class") or ""), settings.get("auto_map") or {}
    except (OSError, AttributeError, ValueError, RecursionError):
        return ""  # loading it says what is wrong with it
    named = own.get("AutoTokenizer") if isinstance(own, dict) else own
    return name or "(unnamed)" if named and not hasattr(transformers, name) else ""


def _encoded(text: str, tokenizer: Tokenizer, options: dict[str, Any]) -> list[int] | str:
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # noqa: BLE001  as above
        return _first_line(error)


def _text(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    apply_chat_template: bool,
    template_date: datetime.date | None,
) -> RenderedPrompt:
    try:
        text = _rendered(prompt, tokenizer, template_date) if apply_chat_template else _joined(prompt)
    except UserError as error:
        return RenderedPrompt(problem=str(error))
    except Exception as error:  # noqa: BLE001  a template is a program of the model's: it can raise anything
        return RenderedPrompt(problem="the chat template does not take it", detail=_first_line(error))
    half = lone_surrogate([text])
    return (
        RenderedPrompt(text, problem="half of a character, which is no Unicode", detail=half)
        if half
        else RenderedPrompt(text)
    )


def _joined(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _rendered(
    prompt: str | Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template_date: datetime.date | None
) -> str:
    def strftime_now(form: str) -> str:
        if template_date is None:
            raise UserError(
                "the chat template asks for today's date, so that prompts would change from day to day: give it a day "
                f"with data.template_date={datetime.date.today()} (evaluate: --template-date)"
            )
        return template_date.strftime(form)

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, strftime_now=strftime_now
    )
    return text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# Whether the files of a model directory agree on how a response ends: one look at start, before anything is loaded.
#
#   | tokenizer files: eos_token                            what the warm start appends, what texts end with
#   | config.json, generation_config.json: eos_token_id     what engines stop at
#   | config.json: vocab_size                               rows of the embedding; ids of prompts are compared later

_END_FILES = ("generation_config.json", "config.json")


def load_checked_tokenizer(hf_dir: Path) -> Tokenizer:
    """Load the tokenizer of a model that is going to answer, and compare it with the model's own files.

    Raises:
        UserError: it cannot be loaded (`load_tokenizer`), or its end-of-sequence token is none that engines stop at, or
            an end token is beyond the embedding; all of it in one message.
    """
    tokenizer = load_tokenizer(hf_dir)
    ends, own, rows = stop_token_ids(hf_dir), tokenizer.eos_token_id, embedding_rows(tokenizer)
    problems = []
    if own not in ends:
        named = ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in ends) or "none"
        problems.append(
            f"the tokenizer ends a text with {own} {tokenizer.eos_token!r}, but config.json and generation_config.json "
            f"name other end tokens (eos_token_id: {named}), so that responses would run on past it: set eos_token_id "
            f"in generation_config.json to {[*ends, own] if ends else own}, or eos_token in tokenizer_config.json"
        )
    beyond = sorted({token for token in [*ends, own] if rows is not None and token >= rows})
    if beyond:
        problems.append(
            f"the end token {', '.join(map(str, beyond))} is beyond the embedding (vocab_size in config.json: {rows}): "
            "the model can never say it"
        )
    if problems:
        raise UserError("\n".join(f"{hf_dir}: {problem}" for problem in problems))
    return tokenizer


def check_same_tokens(tokenizer: Tokenizer, hf_dir: Path, key: str) -> None:
    """Refuse a model that would read the policy's token ids as other tokens.

    Args:
        tokenizer: the policy's.
        hf_dir: directory of the other model, with its tokenizer; it may know more tokens.
        key: key of the configuration that names it.

    Raises:
        UserError: it has no tokenizer, or one that gives an id of the policy's to another token, or to none.
    """
    try:
        theirs = load_tokenizer(hf_dir).get_vocab()
    except UserError as error:
        raise UserError(f"{key}={error}") from error
    differing = sorted(tokenizer.get_vocab().items() - theirs.items(), key=lambda item: item[1])
    if differing:
        named = ", ".join(f"{number} {token!r}" for token, number in differing[:3])
        raise UserError(
            f"{key}={hf_dir}: its tokenizer is not the policy's: {len(differing):,} token ids mean something else "
            f"there or nothing, such as {named}; it must be a model of the same tokenizer"
        )


def stop_token_ids(hf_dir: Path, texts: Sequence[str] = ()) -> list[int]:
    """End-of-sequence token ids of generation_config.json and config.json, ascending; empty if neither names one.

    Args:
        texts: texts whose tokens end a response too.

    Raises:
        UserError: one of the files cannot be read, its eos_token_id is no token id, or a text is not exactly one token.
    """
    found = set(_single_tokens(hf_dir, texts) if texts else ())
    for file in _END_FILES:
        path = hf_dir / file
        if not path.exists():
            continue
        value = _object(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{path}: eos_token_id {value!r} is no token id and no list of token ids")
        found |= set(ids)
    return sorted(found)


def _single_tokens(hf_dir: Path, texts: Sequence[str]) -> list[int]:
    tokenizer = load_tokenizer(hf_dir)
    found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if several := [f"{text!r} ({len(ids)})" for text, ids in zip(texts, found, strict=True) if len(ids) != 1]:
        raise UserError(
            f"rollout.stop={list(texts)}: each must be one token of the tokenizer in {hf_dir}, which makes more or "
            f"none of {', '.join(several)}"
        )
    return [token for (token,) in found]


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {str(error)[:200] or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
