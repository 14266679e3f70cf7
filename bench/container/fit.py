"""Which image fits this machine's driver, before anything is downloaded. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from bench.container.images import Image, images
from bench.measure.nvml import describe_devices


class Fit(NamedTuple):
    """An image and why this machine cannot run it, or None."""

    image: Image
    problem: str | None


def fits() -> list[Fit]:
    """Every image with its problem here."""
    drivers = [device["driver"] for device in describe_devices() if device["driver"]]
    return [Fit(image, problem(image, drivers[0] if drivers else None)) for image in images().values()]


def problem(image: Image, driver: str | None) -> str | None:
    """Why a machine with this NVIDIA driver ("580.159.04", or None) cannot run `image` on its devices.

    >>> from bench.container.images import image_named
    >>> problem(image_named("current"), "550.54.15")
    'needs driver 580 or newer; seen: 550.54.15'
    """
    if image.driver is None:
        return None
    if driver is None:
        return f"needs an NVIDIA driver, {image.driver} or newer; seen: none (without one it runs on the CPU)"
    if int(driver.split(".")[0]) < image.driver:
        return f"needs driver {image.driver} or newer; seen: {driver}"
    return None


def fit_lines() -> list[str]:
    """The images with what they are and whether they fit here."""
    return [f"{item.image.name:10} {item.image.description}: {item.problem or 'fits here'}" for item in fits()]
