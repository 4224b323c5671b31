"""Log messages of other packages that say nothing about this program, dropped one by one: a new warning is seen."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping


class _Drop(logging.Filter):
    """Rejects the records whose message begins with a match of a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


def drop_messages(patterns: Mapping[str, str]) -> None:
    """Install a filter on each logger, in this process; repeatable.

    Args:
        patterns: name of a logger -> regular expression that its messages begin with.
    """
    for name, pattern in patterns.items():
        logger = logging.getLogger(name)
        drop = _Drop(pattern)
        if not any(isinstance(present, _Drop) and present.pattern == drop.pattern for present in logger.filters):
            logger.addFilter(drop)
