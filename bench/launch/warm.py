"""Warm starts: tokenizers and weights that are made once, before the cells that begin from them. Torch-free.

`weights/` comes into being at once and complete, `done.json` is written last. A run that was killed at any point is run again;
one that failed says so in `done.json` and is tried again when it is asked for again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cell import digest
from bench.checkpoint import checkpoint_sha256
from bench.container.overlay import overlay_input
from bench.data.formats import read_rows
from bench.data.manifest import Manifest, load_manifest
from bench.errors import BenchError, MachineError, UserError
from bench.launch.alone import alone
from bench.launch.command import PROGRAM, Agents
from bench.launch.inputs import (
    data_inputs,
    forget_weights,
    image_input,
    kept_record,
    leave_failed_start,
    read_done,
    set_aside,
    start_inputs,
)
from bench.launch.parent import ForkParent
from bench.launch.progress import Line, describe
from bench.launch.supervise import run_trial
from bench.layout import Layout
from bench.matrix import Plan, Warm, load_plan
from bench.record import Record, write_json
from bench.shared_disk import patiently
from bench.trial import Trial, make_trial

INTERRUPTED = 130


def run_warm(target: Path, *, program: str = PROGRAM, search_path: tuple[str, ...] = ()) -> int:
    """Make results/<suite>/warm/<key>/done.json: {key, outcome, sha256, path, reason, fingerprint}.

    Returns 0 also when the training failed, since that is a result; 130 when interrupted. Raises UserError if the plan has no
    such warm start or something was not made yet.
    """
    target = target.absolute()
    layout = Layout(target.parent.parent.parent)
    plan = load_plan(layout.plan)
    warm = next((warm for warm in plan.warm if warm.key == target.parent.name), None)
    if warm is None:
        raise UserError(f"{target}: the plan has no such warm start; one of {', '.join(warm.key for warm in plan.warm) or 'none'}")
    with alone(target) as lock, Line(f"[warm] {describe(warm.cell) if warm.cell else warm.key}") as line:
        if warm.cell is None:
            done, kept = _tokenizer(plan, warm, layout, target)
        else:
            done, kept = _cell(plan, warm, layout, target, program=program, search_path=search_path, keep=(lock,))
        line.end(done["outcome"], done["reason"], kept=kept)
        if done["outcome"] == "cancelled":
            return INTERRUPTED
        if not kept:
            patiently(lambda: write_json(done, target), target, "that it is done")
    return 0


def _done(warm: Warm, fingerprint: str, outcome: str, weights: Path, reason: str | None) -> dict[str, Any]:
    sha256 = checkpoint_sha256(weights) if outcome == "ok" else None
    return {"key": warm.key, "outcome": outcome, "sha256": sha256, "path": weights.name, "reason": reason, "fingerprint": fingerprint}


def _is_done(target: Path, fingerprint: str, weights: Path) -> dict[str, Any] | None:
    """The content of done.json if it stands for the same inputs, went well, and its weights are there."""
    done = read_done(target)
    fits = done is not None and done["outcome"] == "ok" and done.get("fingerprint") == fingerprint and weights.is_dir()
    return done if fits else None


def _tokenizer(plan: Plan, warm: Warm, layout: Layout, target: Path) -> tuple[dict[str, Any], bool]:
    assert warm.tokenizer is not None
    manifests = [load_manifest(layout.data(name)) for name in warm.tokenizer["data"]]
    vocabulary, weights = warm.tokenizer["vocabulary"], target.parent / "weights"
    fingerprint = digest({"data": [manifest.sha256 for manifest in manifests], "vocabulary": vocabulary})
    if done := _is_done(target, fingerprint, weights):
        return done, True
    target.unlink(missing_ok=True)
    forget_weights(weights)
    try:
        _train(manifests, vocabulary, weights, plan.limits.rejected_share)
    except MachineError:
        raise
    except BenchError as error:
        return _done(warm, fingerprint, "error", weights, str(error)), False
    return _done(warm, fingerprint, "ok", weights, None), False


def _train(manifests: list[Manifest], vocabulary: int, weights: Path, rejected_share: float) -> None:
    from bench.models.tokenizer import train_tokenizer

    draft = Path(tempfile.mkdtemp(dir=weights.parent, prefix=".weights."))
    try:
        train_tokenizer(texts(manifests, rejected_share), vocabulary, draft)
        draft.chmod(0o755)
        draft.replace(weights)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def texts(manifests: list[Manifest], rejected_share: float) -> Iterator[str]:
    """Every text of every row, in the order of the files. Raises DataError as `read_rows` does."""
    for manifest in manifests:
        for row in read_rows(Path(manifest.path), manifest.kind, rejected_share=rejected_share).rows:
            yield from (value for key, value in row.items() if key != "id" and isinstance(value, str) and value)


def _cell(plan: Plan, warm: Warm, layout: Layout, target: Path, **launch: Any) -> tuple[dict[str, Any], bool]:
    assert warm.cell is not None
    folder = target.parent
    weights, record_path = folder / "weights", folder / "record.json"
    starts = start_inputs(layout, warm.starts, 0)
    trial = make_trial(
        warm.cell, 0, data=data_inputs(layout, warm.cell), starts=starts.inputs, image=image_input(warm.cell),
        overlay=overlay_input(warm.cell), save_to=str(weights), work=str(folder / "work"), limits=plan.limits,
    )  # fmt: skip
    if done := _is_done(target, trial.fingerprint, weights):
        return done, True
    target.unlink(missing_ok=True)
    record = kept_record(record_path, trial, weights)
    if record is None or record.outcome != "ok":
        if record is not None:
            set_aside(record_path, Path(trial.work))
        forget_weights(weights)
        record = leave_failed_start(trial, record_path, starts.problem) if starts.problem else _run(trial, record_path, **launch)
    return _done(warm, trial.fingerprint, record.outcome, weights, record.reason), False


def _run(trial: Trial, record_path: Path, *, keep: tuple[int, ...], **launch: Any) -> Record:
    if trial.parsed_cell.settings.launcher != "fork":
        return run_trial(trial, record_path, agents=Agents(keep=keep, **launch))
    with ForkParent(record_path.with_name("parent.log"), keep=keep, preload=(), **launch) as parent:
        return run_trial(trial, record_path, parent=parent)
