"""What a strategy needs of packages, judged from their metadata or an image's locks: nothing is imported, so planning stays light."""

from __future__ import annotations

import importlib.metadata
import re
from typing import NamedTuple

from bench.strategies.locked import image_name, locked_versions


class Requirement(NamedTuple):
    """A package and its oldest version that will do."""

    package: str
    at_least: str
    extra: str | None = None
    """The optional extra of this project that brings it. Without one it is a requirement of the project itself, and its absence is
    judged only where torch is installed: a plan may be made on a machine that trains nothing."""

    def problem(self, container: str = "none") -> str | None:
        """What is missing where trials run, or None: here, or in the cell's `container`. What an unknown image holds is not judged.

        >>> Requirement("pydantic", "1.0").problem()
        >>> Requirement("pydantic", "99.5").problem().partition(";")[0]
        'pydantic >= 99.5 is needed'
        >>> Requirement("torch", "2.6").problem("upstream")
        'torch >= 2.6 is needed; seen: 2.5.1 in the image upstream'
        """
        image = image_name(container)
        if image is None:
            return self._problem_here() if container == "none" else None
        seen = locked_versions(image).get(self.package)
        if seen is None:
            return f"{self.package} is not in the image {image}; `container: none` would be right where it is installed"
        return self._too_old(seen, f"{seen} in the image {image}")

    def _problem_here(self) -> str | None:
        seen = installed_version(self.package)
        if seen is not None:
            return self._too_old(seen, seen)
        if self.extra is None and installed_version("torch") is None:
            return None
        return f"{self.package} is not installed; `make install{f'-{self.extra}' if self.extra else ''}` would be right"

    def _too_old(self, seen: str, said: str) -> str | None:
        if release(seen) >= release(self.at_least):
            return None
        return f"{self.package} >= {self.at_least} is needed; seen: {said}"


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
