"""Write the generated pages: `python docs/generate.py`. A test compares what it would write with what is there."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {
    "bench": "the package's ground floor",
    "bench/strategies": "how model and optimizer state lie over ranks",
    "bench/stages": "the three algorithms",
    "bench/rl": "pure tensor arithmetic of PPO",
    "bench/rollout": "generation",
    "bench/models": "models, tokenizers, adapters",
    "bench/data": "sources, formats, synthetic sets, batches",
    "bench/measure": "clocks, memory, provenance",
    "bench/measure/evidence": "proof that a strategy is active",
    "bench/container": "images: what goes in, building, checking, running in them",
    "bench/launch": "ranks, supervision, blocks, Snakemake",
    "bench/report": "from records to a page",
    "bench/report/metrics": "derived metrics, a decorated function each",
}


def architecture() -> str:
    """The map of the package: every module with the first line of its docstring."""
    lines = [
        "# Architecture",
        "",
        "Made by `python docs/generate.py` from the modules' own first lines.",
        "",
        "```",
        "suite.yaml -> Suite -> matrix.expand -> Plan: cells, blocks, warm starts, skipped (with reasons)",
        "  block: one repetition of a comparison set, on one allocation",
        "    each trial without a valid record of the same fingerprint:",
        "      supervise -> torchrun or fork -> worker on each rank -> part",
        "      assemble: parts, missing ranks too -> one record, written once",
        "  report: records -> tables, parity, plots -> report.html, report.md, results.parquet, results.csv",
        "```",
        "",
        "Snakemake decides when and where, Python what and how; they meet only in files. Layers, top to bottom; an import points down",
        "only: `cli` > `report | launch | worker | doctor` > `matrix` > `stages` > `strategies | rollout | rl | measure` >",
        "`models | data` > `checkpoint` > `trial` > `record` > `suite | layout` > `cell | errors`. Planning and reporting never load",
        "torch; only `strategies` loads ColossalAI.",
    ]
    for room, purpose in ROOMS.items():
        lines += ["", f"## {room}/: {purpose}", "", "| module | what |", "|---|---|"]
        for path in sorted((ROOT / room).glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"| `{path.name}` | {_first_line(path)} |")
    return "\n".join(lines) + "\n"


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].replace("|", "\\|") if docstring else ""


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.md").write_text(architecture(), encoding="utf-8")
