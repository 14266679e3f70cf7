"""The verbs of `coati-bench data`; the work is in fetch.py, prompts.py and sources.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bench.data.download import Progress

app = typer.Typer(help="Fetch, check and draw the data that stages train on.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A name of `data list`, file:PATH, or NAME+synthetic-instruct / NAME+synthetic-pairs.")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder for data; default: $COATI_BENCH_CACHE, else the user's cache.")]


@app.command("fetch")
def fetch_command(
    name: Name,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="DIR_OR_URL", help="A copy: its folder, its file, or a mirror's address.")
    ] = None,
    cache: Cache = None,
    accept_sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Accept this content where no verified hash is published.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option(metavar="TARGET", help="Also write the manifest here.")] = None,
) -> None:
    """Bring a data set onto this machine: resumed, checked, its licence shown. Once it is here nothing is done."""
    from bench.data.fetch import fetch
    from bench.data.manifest import save_manifest

    with _progress(name) as progress:
        found = fetch(name, from_=from_, cache=cache, accept_sha256=accept_sha256, progress=progress, say=_say)
    if manifest is not None:
        save_manifest(found, manifest)
    rejected = f", {found.rejected_count} rejected" if found.rejected_count else ""
    typer.echo(f"{found.name}: {found.rows} rows{rejected}, sha256 {found.sha256} ({found.sha256_status})\n{found.path}")
    for row in found.rejected[:5]:
        _say(f"line {row.line}: {row.reason}")


@app.command("verify")
def verify_command(name: Name, cache: Cache = None) -> None:
    """Hash data that is here again and compare it with its manifest."""
    from bench.data.fetch import verify

    found = verify(name, cache=cache)
    typer.echo(f"{found.name}: unchanged, sha256 {found.sha256} ({found.sha256_status})\n{found.path}")


@app.command("list")
def list_command() -> None:
    """Show the known data sets, with their licences and what is known of their bytes."""
    from bench.data.sources import SOURCES

    for source in SOURCES.values():
        rows = "?" if source.rows is None else f"{source.rows}"
        known = "not published" if source.sha256 is None else "published" if source.sha256_verified else "stated by a mirror only"
        typer.echo(f"{source.name}\n  {source.title}: {source.kind}, {rows} rows, {source.format}; sha256 {known}\n  {source.licence}")


@app.command("prompts")
def prompts_command(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Instruction file: JSON array, JSON Lines or Parquet.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The prompt file to write.")],
    count: Annotated[int, typer.Option(help="Prompts to draw, without replacement.")],
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 42,
) -> None:
    """Draw a prompt file for PPO from an instruction file."""
    from bench.data.prompts import sample_prompts

    drawn = sample_prompts(source, target, count=count, seed=seed)
    typer.echo(f"{target}: {len(drawn)} prompts, seed {seed}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _progress(name: str) -> Iterator[Progress | None]:
    """A bar on a terminal; nothing in a log file."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
