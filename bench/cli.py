"""The command line: one thin function a verb; the work is elsewhere.

Exit codes: 0 fine, 1 a regression found by `compare`, 2 the user's mistake, 3 the machine cannot, 130 interrupted.
Every import of substance stands inside its verb: `--help` and `plan` answer at once and never load torch.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import __version__
from bench.checkpoint_commands import app as checkpoint_app
from bench.container.commands import app as container_app
from bench.data.commands import app as data_app
from bench.errors import BenchError

app = typer.Typer(
    name="coati-bench",
    help="Which way of training a chat model fits and is fastest on my cluster, and can I believe the answer?\n\n"
    "Start with `coati-bench run config/quickstart.yaml`: minutes on a CPU, ends with a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(container_app, name="container")
app.add_typer(checkpoint_app, name="checkpoint")
suite_app = typer.Typer(help="Make suite files.", no_args_is_help=True)
app.add_typer(suite_app, name="suite")
schema_app = typer.Typer(help="JSON Schema of the project's files.", no_args_is_help=True)
app.add_typer(schema_app, name="schema")

SuitePath = Annotated[Path, typer.Argument(metavar="SUITE", help="A suite file, for example config/quickstart.yaml.")]
Container = Annotated[str | None, typer.Option("--container", help="Run every cell in this image: a name, or a .sqfs file.")]
Results = Annotated[Path, typer.Option("--results", help="Folder that holds a folder for each suite.")]
Format = Annotated[str, typer.Option("--format", help="text or json.")]


def _price(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"a price is a finite number; seen: {value}")
    return value


@app.command()
def run(
    suite: SuitePath,
    profile: Annotated[str, typer.Option(help="Where to run: a folder of profiles/.")] = "local",
    results: Results = Path("results"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    container: Container = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="What runs images: apptainer, podman or docker; else the first here.")
    ] = None,
) -> None:
    """Run a suite whole: data, warm starts, every cell, report. Repeat it to resume; what is finished is not repeated."""
    from bench.container.runtimes import insist
    from bench.launch.workflow import run_suite

    if runtime is not None:
        insist(runtime)
    raise typer.Exit(run_suite(suite, profile=profile, results=results, dry_run=dry_run, container=container))


@app.command()
def plan(
    suite: SuitePath,
    format: Format = "text",
    commands: Annotated[bool, typer.Option("--commands", help="Print the lines to paste on each node.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write results/<suite>/plan.json for Snakemake.")] = False,
    results: Results = Path("results"),
    price: Annotated[float | None, typer.Option(min=0, callback=_price, help="Price of a device-hour, to say what the plan costs.")] = None,
    container: Container = None,
) -> None:
    """Show what a suite means. Cells, blocks, what each needs, what its trials can claim and cost, what is skipped and why."""
    from bench.container.fit import fits, fits_to_json, image_line
    from bench.layout import Layout
    from bench.matrix import make_plan, plan_to_json, save_plan
    from bench.plan_text import command_text, plan_text
    from bench.report.planning import plan_forecast, plan_notes

    made = make_plan(suite, container=container)
    if write:
        save_plan(made, Layout(results / made.suite).plan)
    if _format(format) == "json":
        content = {**plan_to_json(made), **plan_forecast(made, results, price), "images": fits_to_json(fits())}
        typer.echo(json.dumps(content, indent=1))
    elif commands:
        typer.echo(command_text(made, results))
    else:
        typer.echo(plan_text(made, [*plan_notes(made, results, price), image_line(fits())]))


@app.command()
def report(
    records: Annotated[Path, typer.Argument(help="Folder with records, for example results/quickstart/records.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html, report.md, results.parquet and results.csv.")],
    price: Annotated[float | None, typer.Option(min=0, callback=_price, help="Price of a device-hour, to say what the work costs.")] = None,
    ceilings: Annotated[Path | None, typer.Option(help="What `doctor --bench --format json` printed on these devices.")] = None,
) -> None:
    """Make the report from records. The same records give the same bytes."""
    from bench.report.commands import report as make

    typer.echo(f"Report: {make(records, output, price=price, ceilings=ceilings).html}")


@app.command()
def block(target: Annotated[Path, typer.Argument(help="The file to make: results/SUITE/blocks/BLOCK.json.")]) -> None:
    """Run one block of a plan. It is one repetition of a comparison set; Snakemake calls this."""
    from bench.launch.block import run_block

    raise typer.Exit(run_block(target))


@app.command()
def warm(target: Annotated[Path, typer.Argument(help="The file to make: results/SUITE/warm/KEY/done.json.")]) -> None:
    """Make one warm start of a plan. It is a tokenizer, or weights that cells begin from; Snakemake calls this."""
    from bench.launch.block import run_warm

    raise typer.Exit(run_warm(target))


@app.command()
def trial(
    target: Annotated[
        Path,
        typer.Argument(help="results/SUITE/cells/CELL.json, a cell of a plan; or a trial file, results/SUITE/logs/CELL/0/trial.json."),
    ],
    record: Annotated[Path | None, typer.Option(help="Where the record of a trial file goes; a cell's has its place in the suite.")] = None,
    number: Annotated[int, typer.Option("--trial", min=0, help="Which trial of the cell.")] = 0,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes; the same line is typed on each of them.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which node this is, from 0; node 0 leaves the record.")] = None,
    rendezvous: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the nodes meet: a port of node 0.")] = None,
    wait: Annotated[float, typer.Option(min=1, help="Longest wait for the other nodes, in seconds.")] = 300.0,
) -> None:
    """Run one trial by hand, supervised, on one node or several. It leaves its record, as in a suite."""
    from bench.launch.single import read_rendezvous, run_single

    meeting = read_rendezvous(nodes, node_rank, rendezvous)
    raise typer.Exit(run_single(target, record, number=number, rendezvous=meeting, patience=wait))


@app.command()
def retry(
    suite: SuitePath,
    outcome: Annotated[str, typer.Option(help="Outcomes to repeat, with commas between: error,timeout.")] = "error,timeout",
    results: Results = Path("results"),
) -> None:
    """Let the next run repeat trials that failed. Records and warm starts with these outcomes are set aside, not deleted."""
    from bench.launch.retry import set_outcomes_aside

    outcomes = set(outcome.split(","))
    records, warm = set_outcomes_aside(suite, outcomes, results)
    seen = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in ((records, "record"), (warm, "warm start")) if count]
    if seen:
        typer.echo(f"{' and '.join(seen)} set aside; `coati-bench run {suite}` repeats them")
    else:
        typer.echo(f"no record or warm start of {suite} ended as {' or '.join(sorted(outcomes))}; nothing was set aside")


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(help="Folder with records: a suite's results, or one of results/references.")],
    candidate: Annotated[Path, typer.Argument(help="Folder with the records to judge.")],
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the verdicts here, for a CI server.")] = None,
    allow_differences: Annotated[bool, typer.Option("--allow-differences", help="Compare although settings that matter differ.")] = False,
) -> None:
    """Compare two sets of records, cell by cell. Below results/references the baseline is a reference band. Exit code 1: a regression."""
    from bench.report.compare import compare as judge

    raise typer.Exit(judge(baseline, candidate, markdown=markdown, junit=junit, allow_differences=allow_differences))


@app.command()
def reproduce(
    record: Annotated[Path, typer.Argument(help="The record of the trial to repeat.")],
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on although lock, data or versions differ.")] = False,
    results: Results = Path("results"),
) -> None:
    """Run the trial of a record again. Says whether its value lies in the old interval."""
    from bench.reproduce import reproduce as repeat

    raise typer.Exit(repeat(record, anyway=anyway, results=results))


@app.command()
def doctor(
    format: Format = "text",
    bench: Annotated[bool, typer.Option("--bench", help="Measure what the devices attain; later records carry it.")] = False,
    output: Annotated[Path | None, typer.Option(help="With --bench: also write the figures here, as JSON.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="With --bench: so many processes, one a device; default: all devices.")] = None,
) -> None:
    """Say what this machine has and can run. And what is missing for the rest."""
    from bench.doctor import run_bench, run_doctor

    raise typer.Exit(run_bench(format=_format(format), output=output, ranks=ranks) if bench else run_doctor(format=_format(format)))


@suite_app.command("from-command")
def suite_from_command(
    command: Annotated[
        str, typer.Argument(help="A command of ColossalAI-Chat v0.2.8, in quotes: torchrun ... train_sft.py --strategy ...")
    ],
    output: Annotated[Path | None, typer.Option(help="Write the suite here; it must not exist. Else it is printed.")] = None,
) -> None:
    """Turn an old command line into a suite. Says what could not be carried over and why."""
    from bench.from_command import write_suite

    write_suite(command, output)


@schema_app.command("suite")
def schema_suite() -> None:
    """Print the JSON Schema of a suite file."""
    from bench.suite import suite_schema

    typer.echo(json.dumps(suite_schema(), indent=1))


@schema_app.command("record")
def schema_record() -> None:
    """Print the JSON Schema of a record."""
    from bench.record import record_schema

    typer.echo(json.dumps(record_schema(), indent=1))


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Take the options that stand before a verb."""
    if version:
        typer.echo(f"coati-bench {__version__}")
        raise typer.Exit


def _format(name: str) -> str:
    if name not in ("text", "json"):
        raise typer.BadParameter(f"--format is text or json; seen: {name!r}")
    return name


_UsageProblem = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Typer's own copy of click has no public name for the base of its usage errors."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of the house (see the module's first lines)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no arrow shows a question mark
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    try:
        result: Any = app(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except _UsageProblem as error:  # type: ignore[misc]
        error.show()  # type: ignore[attr-defined]
        return 2
    except BenchError as error:
        print(f"coati-bench: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("coati-bench: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"coati-bench: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 3
    except Exception as error:  # noqa: BLE001 (1 is a verdict of `compare` and `reproduce`, which a fault must not look like)
        traceback.print_exc()
        said = f"coati-bench: {type(error).__name__}: {error}: a fault of coati-bench itself; please report it with the lines above"
        print(said, file=sys.stderr)
        return 3
