"""What a strategy needs of installed packages, judged from their metadata: nothing is imported, so planning stays light."""

from __future__ import annotations

import importlib.metadata
import re
from typing import NamedTuple


class Requirement(NamedTuple):
    """A package and its oldest version that will do."""

    package: str
    at_least: str
    extra: str | None = None
    """The optional extra of this project that brings it. Without one it is a requirement of the project itself, and its absence is
    not judged here: a plan may be made on a machine that trains nothing."""

    def problem(self) -> str | None:
        """What is missing, or None.

        >>> Requirement("pydantic", "1.0").problem()
        >>> Requirement("pydantic", "99.5").problem().partition(";")[0]
        'pydantic >= 99.5 is needed'
        """
        seen = installed_version(self.package)
        if seen is None:
            if self.extra is None:
                return None
            return f"{self.package} is not installed; `make install-{self.extra}` would be right"
        if release(seen) >= release(self.at_least):
            return None
        return f"{self.package} >= {self.at_least} is needed; seen: {seen}"


def installed_version(package: str) -> str | None:
    """The version of a package that is installed here, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers in front of a version, for comparison; pre-releases count as the release that they lead to.

    >>> release("2.13.0+cpu"), release("2.6.0a0+git") >= release("2.6"), release("2.6") > release("2.6.0")
    ((2, 13), True, False)
    """
    numbers = [int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
