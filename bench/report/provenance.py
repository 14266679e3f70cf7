"""What the records say of versions, machines, data and seeds: distinct values, with how many trials have each."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.record import Input
from bench.report.inventory import Inventory, Row
from bench.report.parity import ROLES
from bench.report.text import counted, listed

LEFT_OUT = re.compile(
    r"host|uuid|serial|pci|(^|\.)(started|ended|start|end|environment|env|pid|command|commands|cwd|path)(\.|_|$)", re.IGNORECASE
)
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.@+=~-]+/)+([\w.@+=~-]*)")
MOST_VALUES = 6


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and what the trials say of it."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set or start, by content."""

    name: str
    kind: str
    sha256: str
    facts: tuple[Fact, ...]
    trials: int


def without_paths(text: str) -> str:
    """`text` with every absolute path cut to its last part: a report is passed on, the folders of a machine are not.

    >>> without_paths("FileNotFoundError: '/home/me/run/x.json', see https://example.org/a/b")
    "FileNotFoundError: '…/x.json', see https://example.org/a/b"
    """
    return ABSOLUTE_PATH.sub(lambda found: f"…/{found.group(1)}", text)


def provenance_facts(inventory: Inventory) -> list[Fact]:
    """Versions, locks, commits and machines, sorted by name."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for row in inventory.rows:
        for name, value in set(_flat(row.record.provenance)):
            if not LEFT_OUT.search(name):
                values[name][value] += 1
    return [Fact(name, _distinct(values[name], len(inventory.rows))) for name in sorted(values)]


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list) and any(isinstance(item, (dict, list)) for item in content):
        for item in content:
            yield from _flat(item, prefix)
    elif content not in (None, "", []):
        yield prefix, without_paths(", ".join(map(str, content)) if isinstance(content, list) else str(content))


def _distinct(values: Counter[str], total: int) -> str:
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) == 1 and ordered[0][1] == total:
        return ordered[0][0]
    texts = [f"{value} ({counted(count, 'trial')})" for value, count in ordered[:MOST_VALUES]]
    rest = len(ordered) - MOST_VALUES
    return "; ".join([*texts, f"and {counted(rest, 'other value')}"] if rest > 0 else texts)


def run_facts(inventory: Inventory) -> list[Fact]:
    """Seeds, launchers, attempts and one command, from the records."""
    records = [row.record for row in inventory.rows]
    seeds = sorted({record.seed for record in records})
    launchers = Counter(record.launcher for record in records)
    facts = [Fact("seeds", listed([str(seed) for seed in seeds])), Fact("launchers", _distinct(launchers, len(records)))]
    retried = sum(record.attempt > 1 for record in records)
    facts.append(Fact("trials started more than once", f"{retried} (launch and network incidents only)"))
    commands = [record.provenance["command"] for record in records if record.provenance.get("command")]
    if commands:
        first = commands[0]
        text = " ".join(map(str, first)) if isinstance(first, list) else str(first)
        facts.append(Fact("command of the first trial", without_paths(text)))
    times = [str(record.provenance[key]) for record in records for key in ("started", "ended") if record.provenance.get(key)]
    if times:
        facts.append(Fact("first start, last end", f"{min(times)}, {max(times)}"))
    return facts


def data_sets(rows: Iterable[Row]) -> list[DataSet]:
    """Every data set and start that a trial read, once for each content."""
    found: dict[tuple[str, str], list[Input]] = defaultdict(list)
    for row in rows:
        for item in row.record.inputs:
            found[(item.name, item.sha256)].append(item)
    ordered = sorted(found.items(), key=lambda entry: (entry[0][0] in ROLES, entry[0]))
    return [
        DataSet(name, "start" if name in ROLES else "data", sha256, tuple(_input_facts(items[0])), len(items))
        for (name, sha256), items in ordered
    ]


def _input_facts(item: Input) -> Iterator[Fact]:
    for name in sorted(item.facts):
        value = item.facts[name]
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "":
            yield Fact(name, without_paths(f"{value:,}" if isinstance(value, int) else str(value)))
