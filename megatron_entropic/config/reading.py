"""YAML files and overrides, read by the types of the configuration's keys.

    run.yaml   --compose--> nodes of YAML --+
                                            +--> plain values, in the tree that `Config` checks
    key=value  -----------------------------+

What a word means is decided by its key, not by YAML's own guess: a text key takes `on`, `010`, `2024-01-01`, `1e5` and
`null` as they are written, and a number is read as Python reads it (`1e-6`, `1_000`, `010`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel

from megatron_entropic.files.paths import file_problem

MAX_DEPTH = 30
"""Most levels of nesting of a file; the configuration needs five."""
MAX_BYTES = 1 << 20
_NULL = ("null", "Null", "NULL", "~")
_SWITCHED_OFF = (*_NULL, "", "none", "None", "off", "Off")
"""Words by which people say that there is no number."""
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PLAIN_FLAGS = {"true": True, "false": False}
"""Of what may be a text as well, such as the answer of a game."""
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")}
_QUOTES = "a text that begins with &, * or ! needs quotes in YAML"


class Unreadable(Exception):
    """A text is not YAML at all, or cannot be a configuration; the message says where."""


@dataclass
class Reading:
    """Values and problems of a file and of overrides."""

    values: dict[str, Any] = field(default_factory=dict)
    """The tree of plain values, for pydantic to check."""
    problems: list[str] = field(default_factory=list)
    misread: set[str] = field(default_factory=set)
    """Dotted keys that are in `problems` and not in `values`."""
    lines: dict[str, int] = field(default_factory=dict)
    """Lines of the file from 1, by dotted key."""
    of_file: bool = True
    """Whether the file is being read, else overrides, which have no lines."""

    def refuse(self, key: str, problem: str) -> None:
        """Note that the value of a key cannot be read."""
        self.problems.append(f"{key}: {problem}{self.place(key)}")
        self.misread.add(key)

    def place(self, key: str) -> str:
        """Text such as ` (line 7)` for a key of the file; empty for one that an override set."""
        return f" (line {self.lines[key]})" if key in self.lines else ""


def read_file(path: Path, model: type[BaseModel]) -> Reading:
    """Read the values of a file, as far as they can be read.

    Raises:
        Unreadable: it cannot be opened, or is no YAML with sections.
    """
    if problem := file_problem(path):
        raise Unreadable(problem)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise Unreadable(f"more than {MAX_BYTES:,} bytes: this is no configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8") from error
    node = _compose(text)
    reading = Reading()
    if node is None or _is_null(node):
        return reading
    if not isinstance(node, yaml.MappingNode):
        raise Unreadable(f"expected sections such as 'model:', found {_noun(node)}")
    reading.values = _section(node, model, "", reading)
    return reading


def apply_override(reading: Reading, override: str, model: type[BaseModel]) -> None:
    """Put one `dotted.key=value` into the tree; if it cannot be, note the problem."""
    key, separator, text = override.partition("=")
    *sections, last = parts = key.strip().split(".")
    if not separator or not all(parts):
        reading.problems.append(f"override {override!r}: expected dotted.key=value")
        return
    annotation: Any = model
    for depth, part in enumerate(parts):
        kind = _kind_of(annotation)
        if kind.names and not (kind.section or kind.names & {"table", "any"}):
            owner = ".".join(parts[:depth])
            reading.problems.append(f"unknown key {'.'.join(parts)}: {owner} is a value and has no keys of its own")
            return
        annotation = kind.annotation_of(part)
    if (short := _short_of(annotation)) is not None and not text.lstrip().startswith("{") and text.strip():
        sections, last, parts = parts, short, [*parts, short]
        annotation = _kind_of(annotation).annotation_of(short)
    key = ".".join(parts)
    reading.of_file = False
    target = reading.values
    for part in sections:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    for known in [known for known in reading.lines if f"{known}.".startswith(f"{key}.")]:
        del reading.lines[known]
    reading.misread.discard(key)
    target[last] = _override_value(text, annotation, key, reading)
    if key in reading.misread:
        del target[last]


def _short_of(annotation: Any) -> str | None:
    """Key of a section that a text alone stands for; None for values, and for sections that take none."""
    section = _kind_of(annotation).section
    return getattr(section, "short", None)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Class of the section that an annotation names; None for a value."""
    return _kind_of(annotation).section


@dataclass(frozen=True)
class _Kind:
    """Kinds of values that a key takes, without pydantic's details."""

    names: frozenset[str]
    """Names of the kinds: text, path, flag, whole, real, list, table, section, and any, which is what YAML makes of it;
    empty for a key that does not exist."""
    nullable: bool = False
    item: Any = None
    """Annotation of the items of a list or a table."""
    section: type[BaseModel] | None = None

    def annotation_of(self, name: str) -> Any:
        """Annotation of a key of a section, or of a row of a table; None where there is no such key."""
        if self.section is None:
            return self.item
        known = self.section.model_fields.get(name)
        return None if known is None else known.annotation


_SCALARS = {Path: "path", bool: "flag", int: "whole", float: "real"}


def _kind_of(annotation: Any) -> _Kind:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None:
        return _Kind(frozenset())
    if annotation is NoneType:
        return _Kind(frozenset(), nullable=True)
    if origin is Annotated:
        return _kind_of(arguments[0])
    if origin in (Union, UnionType):
        options = [_kind_of(argument) for argument in arguments]
        return _Kind(
            frozenset().union(*(option.names for option in options)),
            any(option.nullable for option in options),
            next((option.item for option in options if option.item is not None), None),
            next((option.section for option in options if option.section is not None), None),
        )
    if annotation is Any:
        return _Kind(frozenset({"any"}), nullable=True, item=Any)
    if origin is Literal:
        return _Kind(frozenset({"text"}))
    if origin in (list, tuple):
        return _Kind(frozenset({"list"}), item=arguments[0])
    if origin is dict:
        return _Kind(frozenset({"table"}), item=arguments[1])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _Kind(frozenset({"section"}), section=annotation)
    return _Kind(frozenset({_SCALARS.get(annotation, "text")}))


def _override_value(text: str, annotation: Any, key: str, reading: Reading) -> Any:
    kind = _kind_of(annotation)
    bracketed = re.match(r"\s*(\[|-\s)", text) or ("any" in kind.names and re.match(r"\s*\{", text))
    if kind.names & {"table", "section"} or (kind.names & {"list", "any"} and bracketed):
        try:
            node = _compose(text)
        except Unreadable as error:
            reading.refuse(f"{key}={text}", str(error))
            reading.misread.add(key)
            return None
        return {} if node is None else _value(node, annotation, key, reading)
    inner = _unquoted(text)
    return _word(text if inner is None else inner, kind, quoted=inner is not None)


def _unquoted(text: str) -> str | None:
    """Content of the quotes if the whole text is one quoted scalar of YAML, else None."""
    stripped = text.strip()
    if len(stripped) < 2 or stripped[0] not in "\"'" or stripped[-1] != stripped[0]:
        return None
    try:
        node = _compose(stripped)
    except Unreadable:
        return None  # such as "a" or "b": a text that happens to begin and end with quotes
    return str(node.value) if isinstance(node, yaml.ScalarNode) and node.style is not None else None


def _word(text: str, kind: _Kind, *, quoted: bool) -> Any:
    """Value of a single word for a key of this kind; a word of no meaning stays as it is, and pydantic refuses it."""
    if "list" in kind.names:
        if kind.nullable and not quoted and text in (*_NULL, ""):
            return None
        return [_word(text, _kind_of(kind.item), quoted=quoted)]
    if "any" in kind.names:
        plain = text.strip()
        if quoted or plain in (*_NULL, ""):
            return text if quoted else None
        return _PLAIN_FLAGS.get(plain.lower(), _number(text, whole=False))
    if "flag" in kind.names:
        null = kind.nullable and not quoted and text in (*_NULL, "")
        return None if null else _FLAGS.get(text.strip().lower(), text)
    if kind.names & {"whole", "real"}:
        null = kind.nullable and not quoted and text.strip() in _SWITCHED_OFF
        return None if null else _number(text, whole="real" not in kind.names)
    if "path" in kind.names:
        return None if not quoted and text in (*_NULL, "") else text
    return None if kind.nullable and not quoted and text in _NULL else text


def _number(text: str, *, whole: bool) -> Any:
    """The number a text stands for, else the text."""
    word = text.strip()
    if re.fullmatch(r"[-+]?\.(inf|nan)", word, re.IGNORECASE):
        return float(word.replace(".", ""))  # YAML's spelling
    for read in (int, float):
        try:
            number = read(word)
        except ValueError:
            continue
        # 1e3 is a float in Python; keys that count something take it nevertheless (`config_base.Count`).
        return text if whole and "e" in word.lower() else number
    return text


def _compose(text: str) -> yaml.Node | None:
    """Parse the nodes of one YAML document; None if it is empty.

    Raises:
        Unreadable: naming line and column.
    """
    depth = 0
    try:
        # Composing is recursive; looking at the events is not.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise Unreadable(f"line {line}: nested more than {MAX_DEPTH} levels deep")
        return _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(
            f"line {line}: the character U+{ord(text[error.position]):04X} cannot stand in YAML"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        hint = f" ({_QUOTES})" if "alias" in str(error.problem) else ""
        raise Unreadable(f"not valid YAML: {where}{error.problem or error.context}{hint}") from error


class _Loader(yaml.SafeLoader):
    """YAML loader whose scalars remember whether they had an anchor."""

    # `name: &ref` is an empty value to YAML, and not to the person who wrote it.
    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: Any = super().compose_scalar_node(anchor)
        node.anchored = anchor is not None
        return cast(yaml.ScalarNode, node)


def _section(node: yaml.MappingNode, model: type[BaseModel], prefix: str, reading: Reading) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in _pairs(node, prefix, reading):
        known = model.model_fields.get(name)
        # Of a key that does not exist only the name matters.
        values[name] = None if known is None else _value(value, known.annotation, prefix + name, reading)
        if prefix + name in reading.misread:
            del values[name]
    return values


def _pairs(node: yaml.MappingNode, prefix: str, reading: Reading) -> Iterator[tuple[str, yaml.Node]]:
    """Yields name and value of each key, every key once."""
    first: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            owner = f"{prefix.removesuffix('.')}, " if prefix else ""
            reading.problems.append(f"{owner}line {line}: a key is a text, this is {_noun(key_node)}")
        elif (name := str(key_node.value)) in first:
            lines = f"lines {first[name]} and {line}"
            reading.problems.append(f"key {prefix + name!r} is given twice ({lines})")
        else:
            first[name] = line
            if reading.of_file:
                reading.lines[prefix + name] = line
            yield name, value


def _value(node: yaml.Node, annotation: Any, key: str, reading: Reading) -> Any:
    """The plain value of a node, for a key of this type."""
    kind = _kind_of(annotation)
    if kind.section is not None and isinstance(node, yaml.MappingNode):
        return _section(node, kind.section, f"{key}.", reading)
    if kind.names & {"table", "any"} and isinstance(node, yaml.MappingNode):
        return {name: _value(value, kind.item, key, reading) for name, value in _pairs(node, f"{key}.", reading)}
    if kind.names & {"list", "any"} and isinstance(node, yaml.SequenceNode):
        return [_value(item, kind.item, key, reading) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        wanted = "keys of its own" if kind.names & {"section", "table"} else "a single value"
        reading.refuse(key, f"needs {wanted}, this is {_noun(node)}")
        return None
    if kind.section is not None and (short := _short_of(annotation)) is not None and not _is_null(node):
        return {short: _value(node, kind.annotation_of(short), f"{key}.{short}", reading)}
    if kind.names & {"section", "table"}:
        # "reward:" and nothing below it means its defaults.
        return {} if _is_null(node) else _number(node.value, whole=False)
    plain: Any = node
    if node.tag not in _TAGS or (plain.anchored and not node.value and node.style is None):
        reading.refuse(key, _QUOTES)
        return None
    nothing = node.style is None and not node.value  # an empty text has quotes
    return None if nothing else _word(node.value, kind, quoted=node.style is not None)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in (*_NULL, "")


def _noun(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "a single value"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
