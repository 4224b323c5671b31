"""Code that a configuration names as `module:attribute`: losses, verifiers and controllers of one's own."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from typing import Any

from megatron_entropic.errors import UserError


def is_module_name(name: str) -> bool:
    """Whether a name has the form `module:attribute`."""
    module, separator, attribute = name.partition(":")
    return bool(separator) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def find_attribute(key: str, name: str, *, arguments: int | None, kind: type | None = None) -> Any:
    """Find the function or class that `module:attribute` names; the current directory is looked through too.

    Args:
        key: key of the configuration, for messages.
        name: value of the key.
        arguments: number of arguments that it must take; None: whoever calls it looks.
        kind: class whose instances will do as well.

    Raises:
        UserError: the module cannot be imported, has no such attribute, or it cannot be called so.
    """
    module_name, _, attribute = name.partition(":")
    _look_into_the_current_directory()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever somebody's own file raises is theirs to mend
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if "importlib" in place.filename else f" ({place.filename}, line {place.lineno})"
        raise UserError(f"{key}={name}: {module_name} cannot be imported: {_words(error)}{where}") from error
    found = getattr(module, attribute, None)
    if kind is not None and isinstance(found, kind):
        return found
    if not callable(found):
        raise UserError(f"{key}={name}: there is no function or class {attribute} in {module_name}")
    try:
        if arguments is not None:
            inspect.signature(found).bind(*[None] * arguments)
    except TypeError as error:
        raise UserError(f"{key}={name}: is called with {arguments} arguments: {error}") from error
    except ValueError:
        return found  # written in C, without a signature to look at
    return found


def compile_pattern(key: str, pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Compile the regular expression that is the value of `key`.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(pattern, flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{key}: not a regular expression: {error}") from error


def _look_into_the_current_directory() -> None:
    # Ray's workers and verifier processes look there and an installed command does not: without one rule for all,
    # `replay` does not find the loss that `train` found.
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current directory does not exist any more: change to another one") from error
    if here not in sys.path:
        sys.path.append(here)


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
