"""results.parquet and results.csv: one row a record, every metric a column."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.cell import cell_to_json
from bench.report.analysis import Analysis, CellResult
from bench.report.metrics import METRICS
from bench.report.provenance import without_paths
from bench.report.scaling import KINDS, scaled

LEADING = ("stage", "model", "strategy", "lora_rank", "nodes", "processes_per_node")


def result_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """One flat mapping for each record, in the order of the tables; a column that a stage lacks is None."""
    scaling = {result.cell.cell_id: _scaling(analysis, result) for result in analysis.results if result.trials}
    return [
        _row(analysis, row.file)
        | {name: found.get(row.record.trial) for name, found in scaling[row.record.cell_id].items()}
        | {"file": row.file}
        for row in analysis.inventory.rows
    ]


def _scaling(analysis: Analysis, result: CellResult) -> dict[str, dict[int, float]]:
    """Scaling efficiencies of a cell by trial number, as columns."""
    return {f"{kind}_scaling_efficiency": scaled(result, analysis.of_stage(result.cell.stage), kind).efficiencies for kind in KINDS}


def _row(analysis: Analysis, file: str) -> dict[str, Any]:
    trial = analysis.trials[file]
    record, parity, band = trial.record, analysis.parities.get(file), analysis.bands.get(file)
    cell = cell_to_json(trial.cell)
    written = {name: without_paths(json.dumps(value)) if isinstance(value, (list, dict)) else value for name, value in cell.items()}
    settings = {name: value for name, value in written.items() if name not in LEADING}
    window = trial.window
    return {
        **{name: cell[name] for name in LEADING},
        "trial": record.trial,
        "seed": record.seed,
        "outcome": record.outcome,
        "reason": without_paths(record.reason) if record.reason else None,
        "not_measured": trial.clock_problem,
        "impossible": "; ".join(trial.impossible) or None,
        "indicative": window.indicative if window else None,
        "steady": window.steady if window else None,
        "warm_up_laps": window.dropped if window else None,
        "parity": parity.state if parity else None,
        "parity_reason": parity.reason or None if parity else None,
        "parity_first_deviation": parity.first if parity else None,
        "parity_largest_deviation": parity.largest if parity else None,
        "reference_band": band.state if band else None,
        **{name: trial.values[name].number if name in trial.values else None for name in METRICS},
        **settings,
        "flags": json.dumps(record.flags, ensure_ascii=False),
        "attempt": record.attempt,
        "launcher": record.launcher,
        "emulated": record.emulated,
        "simulated_nodes": record.simulated_nodes,
        "cell_id": record.cell_id,
        "fingerprint": record.fingerprint,
    }


def result_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as a typed table: columns in the order in which they first occur."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pa.table({name: pa.array(values, type=_type(name, values)) for name, values in columns.items()})


def _type(name: str, values: list[Any]) -> pa.DataType:
    """Metrics and mixed numbers are float64 whatever the data; a column without any value is text."""
    kinds = {type(value) for value in values if value is not None}
    if (
        name in METRICS
        or (name.startswith("parity_") and name.endswith("deviation"))
        or name.endswith("_scaling_efficiency")
        or kinds in ({float}, {int, float})
    ):
        return pa.float64()
    return {frozenset({int}): pa.int64(), frozenset({bool}): pa.bool_()}.get(frozenset(kinds), pa.string())


def parquet_bytes(table: pa.Table) -> bytes:
    """`table` as a Parquet file; equal tables give equal bytes."""
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd")
    content: bytes = out.getvalue().to_pybytes()
    return content


def csv_text(table: pa.Table) -> str:
    """`table` as CSV with a header; None is empty, numbers are written so that they read back exactly."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return out.getvalue()
