"""HTML pages from templates. They share one style sheet, and each is a single file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from megatron_entropic.files.atomic import write_text
from megatron_entropic.files.text import printable, shortened


def render_page(template: Path, **values: Any) -> str:
    """Fill in a template; everything in `values` is escaped, and a name that is missing is an error.

    Control characters, which HTML does not allow and a terminal would obey, are shown as signs. Templates have the
    filter `shortened`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = shortened
    return environment.get_template(template.name).render(**values)


def write_page(path: Path, page: str) -> Path:
    """Write a page as a whole: an open page is replaced at once, never half written. Returns the path."""
    write_text(path, page, durable=False)
    return path
