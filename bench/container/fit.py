"""Which image fits this machine's NVIDIA driver and devices, before anything is downloaded. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.container.images import Image, images
from bench.measure.nvml import describe_devices

NO_DEVICE = "no NVIDIA device here"


class Fit(NamedTuple):
    """An image and why this machine cannot run it on its devices, or None."""

    image: Image
    problem: str | None
    limit: str | None = None
    """What an image that fits does without, or None."""

    def __str__(self) -> str:
        said = self.problem or (f"fits here; {self.limit}" if self.limit else "fits here")
        return f"{self.image.name:10} {self.image.description}{without_kernels(self.image)}: {said}"


def without_kernels(image: Image) -> str:
    """That an image for devices does without ColossalAI's kernels, or nothing.

    >>> from bench.container.images import image_named
    >>> without_kernels(image_named("upstream")), without_kernels(image_named("current"))
    (", without ColossalAI's kernels (gemini, optimizer hybrid)", '')
    """
    return ", without ColossalAI's kernels (gemini, optimizer hybrid)" if image.cuda and not image.compiler else ""


def fits(devices: Sequence[dict[str, Any]] | None = None) -> list[Fit]:
    """Every image with its problem on `devices`, as `describe_devices` gives them; by default on those of this machine."""
    seen = describe_devices() if devices is None else devices
    return [Fit(image, problem(image, seen), limit(image, seen)) for image in images().values()]


def best(found: Sequence[Fit]) -> Fit:
    """The image to take: of those that fit, the first for devices that has no limit, else for devices, else the CPU's."""
    fitting = [item for item in found if item.problem is None]
    return min(fitting, key=lambda item: (item.image.driver is None, item.limit is not None))


def problem(image: Image, devices: Sequence[dict[str, Any]]) -> str | None:
    """Why `image` cannot run on all of these devices, or None. What a driver does not tell is not held against it.

    >>> from bench.container.images import image_named
    >>> problem(image_named("current"), [{"name": "NVIDIA H100", "driver": "550.54.15", "compute_capability": "9.0"}])
    'needs driver 580 or newer; seen: 550.54.15'
    >>> problem(image_named("current"), [{"name": "Tesla V100", "driver": "580.1", "compute_capability": "7.0"}])
    'has no code for Tesla V100; seen: compute capability 7.0; it has 7.5, 8.0, 8.6, 9.0, 10.0, 12.0+'
    """
    if image.driver is None:
        return None
    if not devices:
        return f"needs driver {image.driver} or newer; seen: none ({NO_DEVICE})"
    driver = devices[0]["driver"]
    if major(driver) < (image.driver_limited or image.driver):
        return f"needs driver {image.driver_limited or image.driver} or newer; seen: {driver}"
    for device in devices:
        capability = device.get("compute_capability")
        if capability and not runs(image.architectures, capability):
            known = ", ".join(image.architectures)
            return f"has no code for {device['name']}; seen: compute capability {capability}; it has {known}"
    return None


def limit(image: Image, devices: Sequence[dict[str, Any]]) -> str | None:
    """What `image` does without under this driver, or None."""
    if image.driver is None or not devices or major(devices[0]["driver"]) >= image.driver:
        return None
    return (
        f"CUDA {image.cuda} wants driver {image.driver}, under {devices[0]['driver']} it runs by CUDA's minor version compatibility, "
        "without what needs the newer driver"
    )


def major(driver: str) -> int:
    """Major version of a driver, such as "580.159.04"."""
    return int(driver.split(".", maxsplit=1)[0])


def runs(architectures: Sequence[str], capability: str) -> bool:
    """Whether code for `architectures` runs on a device of this compute capability.

    Machine code runs on devices of the same major number and the same or a higher minor one, PTX on all that are newer
    (CUDA C++ Programming Guide, "Application Compatibility").

    >>> runs(["8.0", "9.0"], "8.9"), runs(["8.6"], "8.0"), runs(["9.0"], "10.0"), runs(["9.0+"], "12.0")
    (True, False, False, True)
    """
    wanted = _numbers(capability)
    built = [(_numbers(name.rstrip("+")), name.endswith("+")) for name in architectures]
    return any((one[0] == wanted[0] and one <= wanted) or (ptx and one <= wanted) for one, ptx in built)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def fit_lines(found: Sequence[Fit] | None = None) -> list[str]:
    """The images with what they are and whether they fit here."""
    return [str(item) for item in (fits() if found is None else found)]


def fits_to_json(found: Sequence[Fit]) -> list[dict[str, Any]]:
    """The same for programs: [{image, fits, problem, limit, kernels, best}]; `kernels`: whether ColossalAI's are compiled into it."""
    chosen = best(found)
    return [
        {
            "image": item.image.name, "fits": item.problem is None, "problem": item.problem, "limit": item.limit,
            "kernels": item.image.compiler is not None, "best": item is chosen,
        }
        for item in found
    ]  # fmt: skip


def image_line(found: Sequence[Fit]) -> str:
    """One line: the image for this machine, and why none for its devices, or one that does without something.

    >>> image_line(fits([]))
    'Image that fits here: cpu (no NVIDIA device here).'
    """
    chosen = best(found)
    why = chosen.limit
    if chosen.image.driver is None:
        problems = [f"{item.image.name} {item.problem}" for item in found if item.problem]
        why = NO_DEVICE if any(NO_DEVICE in text for text in problems) else "; ".join(problems)
    return f"Image that fits here: {chosen.image.name}{f' ({why})' if why else ''}."
