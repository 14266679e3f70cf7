"""Under which conditions a trial ran, as far as they change its numbers: what must be equal before two trials are compared. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bench.measure.provenance import PACKAGES, machine, source, versions
from bench.record import Record

NO_NUMBERS = ("pydantic", "snakemake")
"""Recorded packages that schedule and check; no number depends on their version."""
VERSIONS = ("python", *(name for name in PACKAGES if name not in NO_NUMBERS), "cuda", "nccl", "cudnn")
ABSENT = "none"
"""The version of a package that is not installed."""
DIGITS = 12
"""Digits of a hash that are shown; all of them are compared."""


class Difference(NamedTuple):
    """A condition that was not the same."""

    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} / {self.now}"


def conditions(record: Record) -> dict[str, str]:
    """Condition -> value of one trial; what the record does not say is left out.

    Commit and weights that a trial began from are none: a comparison of two commits is about the one, and follows from it in the
    other.
    """
    cell, facts = record.cell, record.lead.facts if record.lead else {}
    found = {"device": cell.get("device"), "device name": _device_name(record), "launcher": record.launcher}
    found["image"] = _images(record.provenance.get("machines"))
    if cell.get("device") == "cuda":
        found |= {"power limit": _power_limits(record.provenance.get("machines")), **_settings(record.provenance.get("machines"))}
    found["precision"] = facts.get("precision") or cell.get("precision")
    found |= _software(record.provenance.get("versions"), record.provenance.get("source"), str(cell.get("device")))
    roles = {cell.get("data"): "data", cell.get("ptx"): "ptx data", "tokenizer": "tokenizer"}
    found |= {roles[item.name]: item.sha256 for item in record.inputs if item.name in roles}
    return {name: str(value) for name, value in found.items() if value is not None}


def conditions_here(device: str) -> dict[str, str]:
    """What `conditions` would say of a trial that ran in this process's place: software and device."""
    here = _software(versions(), source(), device)
    names = {str(found["name"]) for found in machine()["devices"]} if device == "cuda" else {machine()["cpu"]}
    found = {"device name": ", ".join(sorted(filter(None, names))) or "none", "image": _images([machine()])}
    if device == "cuda":
        found |= {"power limit": _power_limits([machine()]), **_settings([machine()])}
    return here | {name: value for name, value in found.items() if value is not None}


def differences(before: Iterable[Mapping[str, str]], now: Iterable[Mapping[str, str]]) -> list[Difference]:
    """The conditions that both sides state and that are not the same, each side being one trial or more.

    Where a side is mixed in itself, that is a difference too: nothing says that what is paired ran under the same ones.

    >>> differences([{"torch": "2.13.0", "device": "cpu"}], [{"torch": "2.11.0", "precision": "fp32"}])
    [Difference(name='torch', before='2.13.0', now='2.11.0')]
    >>> differences([{"device name": "A"}, {"device name": "B"}], [{"device name": "B"}, {"device name": "A"}])
    [Difference(name='device name', before='A and B', now='A and B')]
    """
    first, second = _values(before), _values(now)
    apart = [name for name in first if name in second and (first[name] != second[name] or len(first[name]) > 1)]
    return [Difference(name, _shown(first[name]), _shown(second[name])) for name in apart]


def _device_name(record: Record) -> Any:
    """The GPU's name; for a CPU its model, since a rank knows the architecture only."""
    if record.cell.get("device") == "cpu":
        machines = record.provenance.get("machines") or [{}]
        return machines[0].get("cpu")
    return record.lead.facts.get("device_name") if record.lead else None


def _images(machines: Any) -> str | None:
    """Name of the container image on every node (its digest is part of the name), `none` where there was none."""
    names = {str(found.get("container") or "none") for found in machines or [] if "container" in found}
    return ", ".join(sorted(names)) or None


def _power_limits(machines: Any) -> str | None:
    """What the devices of all nodes may draw; None where none says so. A capped card is another card."""
    devices = [device for found in machines or [] for device in found.get("devices") or []]
    limits = sorted({float(device["power_limit_watts"]) for device in devices if device.get("power_limit_watts")})
    return ", ".join(f"{limit:.0f} W" for limit in limits) or None


def _settings(machines: Any) -> dict[str, str]:
    """What else an operator may have set on the devices of all nodes, as far as it is known: application clock, error correction."""
    devices = [device for found in machines or [] for device in found.get("devices") or []]
    names = {"application clock, MHz": "application_sm_clock_megahertz", "ECC": "ecc"}
    known = {name: {str(device[key]) for device in devices if device.get(key) is not None} for name, key in names.items()}
    return {name: ", ".join(sorted(values)) for name, values in known.items() if values}


def _software(packages: Any, origin: Any, device: str) -> dict[str, str]:
    """Versions (`none` where a package is not installed), and the locks of the device's family; sdist.lock is in both families."""
    packages, locks = packages or {}, (origin or {}).get("locks") or {}
    found = {name: packages[name] or ABSENT for name in VERSIONS if name in packages}
    return found | {name: value for name, value in locks.items() if name.startswith((device, "sdist"))}


def _values(sides: Iterable[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for side in sides:
        for name, value in side.items():
            found.setdefault(name, set()).add(value)
    return {name: tuple(sorted(values)) for name, values in found.items()}


def _shown(values: tuple[str, ...]) -> str:
    return " and ".join(value[:DIGITS] if len(value) == 64 else value for value in values)
