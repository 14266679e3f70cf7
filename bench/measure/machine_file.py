"""What `doctor --bench` measured on this machine, kept in the user's cache, so that every later record can carry it. Torch-free.

One file for each device, by its UUID, since devices of one name differ; a CPU goes by the name of the host.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.layout import cache_folder, file_name

SCHEMA = "coati-bench/ceilings/1"


def cpu_key() -> str:
    """What the ceilings of this host's CPU go by."""
    return f"cpu-{platform.node()}"


def ceilings_folder() -> Path:
    """Where ceilings are kept."""
    return cache_folder() / "ceilings"


def ceilings_file(key: str) -> Path:
    """Where the ceilings of a device are kept."""
    return ceilings_folder() / f"{file_name(key)}.json"


def remember_ceilings(found: Mapping[str, Any], key: str) -> Path:
    """Keep the ceilings of a device. Raises OSError."""
    from bench.record import write_json  # not needed by those who only read, one process on every node

    path = ceilings_file(key)
    write_json({"schema": SCHEMA, **found}, path)
    return path


def known_ceilings(devices: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What was measured on this node: of the first of `devices` (uuid) with a file, the visible ones first; without devices, of its CPU."""
    uuids = [str(device["uuid"]) for device in devices]
    visible = [uuid for uuid in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if uuid in uuids]
    return next(filter(None, map(_load, [*visible, *uuids] or [cpu_key()])), None)


def _load(key: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        content = json.loads(ceilings_file(key).read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("schema") == SCHEMA:
            return content
    return None
