"""Every exception of the package, drawn as a tree.

BenchError
├── UserError            exit code 2: the user can mend it
│   ├── SuiteError       a suite file, with all of its mistakes at once
│   ├── DataError        a data file or its source
│   ├── CheckpointError  weights that do not fit the model they are meant for
│   └── RecordError      a record that is not one
└── MachineError         exit code 3: this machine cannot do it (no device, no space, no port)

A text says *what is wrong; what was seen; what would be right*.
"""

from __future__ import annotations

from typing import NamedTuple


class BenchError(Exception):
    """Base of all errors that are told to the user without a traceback."""

    exit_code = 1


class UserError(BenchError):
    """Something that the user wrote or named cannot be used."""

    exit_code = 2


class Mistake(NamedTuple):
    """One mistake in a file: where it stands, what is wrong (and what would be right), and the value seen."""

    path: str
    problem: str
    value: object

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; seen: {self.value!r}"


class SuiteError(UserError):
    """A suite file cannot be used; `mistakes` has every mistake found, not only the first."""

    def __init__(self, source: str, mistakes: list[Mistake]) -> None:
        self.source, self.mistakes = source, mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {mistake}" for mistake in mistakes)]))


class DataError(UserError):
    """A data source or file is missing, corrupt or not of the stated format."""


class CheckpointError(UserError):
    """A checkpoint does not fit the model that should load it."""


class RecordError(UserError):
    """A file is not a valid record."""


class MachineError(BenchError):
    """The machine lacks what the request needs."""

    exit_code = 3


def shown(value: object) -> str:
    """A value as an error shows what was seen: a long one by its beginning.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def json_fault(error: Exception) -> str:
    """What is wrong with a file that is no JSON, in our words where Python's are about Python."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "set_int_max_str_digits" in str(error):
        return "a number of too many digits"
    return str(error.strerror) if isinstance(error, OSError) else str(error)
