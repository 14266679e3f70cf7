"""Which image fits is judged from the driver and the devices that NVML shows, and nothing is fetched for it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.container.fit import fit_lines, fits, image_line
from bench.container.images import images
from bench.measure import nvml
from tests.fake_nvml import FakeNvml


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(nvml, "load_nvml", lambda: (fake, None))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.mark.parametrize(
    ("version", "capability", "line"),
    [
        ("580.65.06", (9, 0), "Image that fits here: current."),
        ("590.1", (12, 1), "Image that fits here: current."),
        ("550.54.15", (9, 0), "Image that fits here: upstream."),
        ("580.65.06", (7, 0), "Image that fits here: upstream."),  # CUDA 13 has no code for Volta
        ("570.1", (8, 9), "Image that fits here: upstream."),  # 8.6's code runs on 8.9
        (
            "525.60.13",
            (8, 0),
            "Image that fits here: upstream (CUDA 12.4 wants driver 550, under 525.60.13 it runs by CUDA's minor version",
        ),
        ("470.1", (8, 0), "Image that fits here: cpu (current needs driver 580 or newer; seen: 470.1; upstream needs driver 525 or newer;"),
        ("570.1", (10, 0), "upstream has no code for NVIDIA Test 80GB; seen: compute capability 10.0; it has 5.0, 6.0,"),
    ],
)
def test_the_image_follows_from_driver_and_compute_capability(
    driver: FakeNvml, version: str, capability: tuple[int, int], line: str
) -> None:
    driver.driver, driver.capability = version, capability
    assert line in image_line(fits())


def test_without_a_device_it_is_the_cpus(driver: FakeNvml) -> None:
    driver.cards = 0
    assert image_line(fits()) == "Image that fits here: cpu (no NVIDIA device here)."
    assert [item.image.name for item in fits() if item.problem is None] == ["cpu"]


def test_a_capability_that_the_driver_does_not_tell_is_not_held_against_it(driver: FakeNvml) -> None:
    driver.broken["nvmlDeviceGetCudaComputeCapability"] = "Not Supported"
    assert image_line(fits()) == "Image that fits here: current."


def test_every_image_has_a_line(driver: FakeNvml) -> None:
    assert [line.split()[0] for line in fit_lines()] == list(images())


def test_an_image_for_devices_says_what_its_torch_was_built_for() -> None:
    for image in images().values():
        assert (image.cuda is None) == (image.driver is None) == (not image.architectures)


@pytest.mark.parametrize("verb", [["doctor"], ["plan", "config/quickstart.yaml"]])
def test_doctor_and_plan_name_it(driver: FakeNvml, verb: list[str]) -> None:
    driver.driver = "550.54.15"
    text = CliRunner().invoke(app, verb).output
    assert "Image that fits here: upstream." in text
    content = json.loads(CliRunner().invoke(app, [*verb, "--format", "json"]).stdout)
    assert [item["image"] for item in content["images"] if item["best"]] == ["upstream"]
    assert {item["image"]: item["fits"] for item in content["images"]} == {"cpu": True, "current": False, "upstream": True}
