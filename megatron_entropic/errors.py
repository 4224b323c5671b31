"""Failures with a message meant for the person who started the run."""

from __future__ import annotations


class UserError(ValueError):
    """The person who started the command must change something; the message says what and where. Exit status 2.

    It is a ValueError so that a reader of one row or one value can turn it into a line of a longer list of problems.
    """


class RunError(RuntimeError):
    """A run cannot go on; the message says what happened, where, and what to do."""


class PeerDied(RunError):
    """A process of the run is gone: the message names it and the phase it was needed in."""


class StopAsked(RunError):
    """A signal asked the run to end: its state is saved and the same command continues."""


class PhaseTimeout(RunError):
    """A wait between processes passed its limit: the message names the phase and who is missing."""
