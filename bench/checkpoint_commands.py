"""The verbs of `coati-bench checkpoint`; the work is in bench/models/inspection.py and bench/models/convert.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look into weights, and turn them from one form into another.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(help="A folder, .safetensors file, index of shards (.index.json) or state dict (.pt).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("inspect")
def inspect(path: Source, as_json: AsJson = False) -> None:
    """Show the names, shapes and types of weights, which model they fit, and where they come from."""
    from bench.models.inspection import inspect_checkpoint, inspection_text

    found = inspect_checkpoint(path)
    typer.echo(json.dumps(found, indent=1) if as_json else inspection_text(found, path))


@app.command("convert")
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="What to write; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="folder (Hugging Face names), or coati 0.2.8's state dict: actor, reward-model, critic.")
    ] = "folder",
    model: Annotated[
        str | None, typer.Option(help="Architecture: a preset or a folder with config.json. Found by itself if it can be.")
    ] = None,
    lora: Annotated[str, typer.Option(help="What becomes of LoRA layers: merge, split or refuse.")] = "merge",
    stage: Annotated[str | None, typer.Option(help="The stage that made the weights: sft, rm or ppo.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder whose tokenizer goes along.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn state dicts of coati 0.2.8 into checkpoint folders and back; nothing is written unless every name is accounted for."""
    from bench.models.convert import convert as turn
    from bench.models.convert import report_text

    report = turn(source, target, to=to, lora=lora, model=model, stage=stage, tokenizer=tokenizer)  # type: ignore[arg-type]
    typer.echo(json.dumps(report, indent=1) if as_json else report_text(report, target))
