"""report.html: one file that needs no network, renders without scripts, and prints."""

from __future__ import annotations

import base64
import hashlib
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.report.metrics import METRICS
from bench.report.page import STATE_WORDS, SYMBOLS, Page
from bench.report.svg import DASHES


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("bench.report", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip


def html(page: Page) -> str:
    """Return the report as one HTML document."""
    environment = _environment()
    style, script = (_source(environment, name) for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        page=page,
        style=Markup(style),  # noqa: S704 (our own file)
        script=Markup(script),  # noqa: S704 (our own file)
        script_sha256=_integrity(script),
        symbols=SYMBOLS,
        state_words=STATE_WORDS,
        metrics=[item for item in METRICS.values() if set(item.stages) & {stage.name for stage in page.stages}],
        dashes=DASHES,
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _integrity(script: str) -> str:
    """The hash by which the page's content security policy allows its one script and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
