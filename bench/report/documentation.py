"""docs/metrics.md, generated: `python -m bench.report.documentation > docs/metrics.md`. A test compares."""

from __future__ import annotations

import sys

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.measure import physics
from bench.report import bands, parity, statistics, windows
from bench.report.metrics import METRICS, Metric, primary_metric
from bench.stages.base import SPECS


def metrics_page() -> str:
    """Return the page: rules with their numbers from the code, then every metric."""
    environment = Environment(
        loader=PackageLoader("bench.report", "templates"),
        autoescape=False,  # noqa: S701 (Markdown from our own code; no record enters it)
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{share:.0%}",
        "excess": lambda factor: f"{factor - 1:.0%}",
        "power": lambda value: f"{value:.0e}".replace("e-0", "e-"),
    }
    primary = ", ".join(f"`{primary_metric(stage)}` ({stage})" for stage in SPECS)
    free = ", ".join(f"`{name}`" for name in parity.SAME_LOSS[3:])
    text = environment.get_template("metrics.md").render(
        windows=windows, physics=physics, parity=parity, bands=bands, statistics=statistics, primary=primary, free=free, groups=_groups()
    )
    return text.rstrip("\n") + "\n"


def _groups() -> list[tuple[str, list[Metric]]]:
    """Metrics that all stages have, then those of each stage."""
    everywhere = tuple(SPECS)
    groups = [("All stages", [item for item in METRICS.values() if item.stages == everywhere])]
    for stage, spec in SPECS.items():
        groups.append((spec.title, [item for item in METRICS.values() if stage in item.stages and item.stages != everywhere]))
    return groups


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
