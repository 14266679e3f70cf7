"""A trial rebuilt from its record alone: cell, data, starts; and what is not here as it was there. Torch-free.

Data is taken from the cache or fetched again, a tokenizer is trained again, weights are taken from where the record or the
results folders have them; all of it counts by its sha256.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from bench.cell import Cell
from bench.checkpoint import checkpoint_sha256
from bench.data.cache import sha256_of
from bench.data.fetch import fetch
from bench.errors import BenchError, CheckpointError, RecordError, UserError
from bench.launch.single import run_single
from bench.launch.warm import texts
from bench.layout import Layout
from bench.matrix import cell_data, load_plan
from bench.measure.conditions import DIGITS, conditions, conditions_here, differences
from bench.measure.provenance import source
from bench.record import Input, Record
from bench.strategies.base import all_strategies
from bench.suite import Limits
from bench.trial import Trial, make_trial, save_trial

FOLDER = "reproduced"
"""Below the results folder: <cell>/trial<k>-run<n>.json and its logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """A trial as its record has it, as far as that is possible here."""

    trial: Trial | None
    """None where something is missing."""
    differences: tuple[str, ...]
    """What is here, but not as it was."""
    missing: tuple[str, ...]
    """What is not here at all, and how it gets here."""


@dataclass(slots=True)
class _Findings:
    """What was seen on the way."""

    differences: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def rebuild(record: Record, path: Path, results: Path) -> Rebuilt:
    """The trial behind `record`, which lies at `path`; `results` holds the suites whose warm starts may serve.

    Raises RecordError if the record's cell cannot run under this version at all.
    """
    cell, found = _cell(record, path), _Findings()
    if cell.cell_id != record.cell_id:
        found.differences.append(f"cell: {record.cell_id} recorded, its settings here are those of {cell.cell_id}")
    _compare_place(record, cell, found)
    of_place = len(found.differences)
    inputs = {item.name: item for item in record.inputs}
    data = [_data(inputs[name], found) if name in inputs else None for name in cell_data(cell)]
    found.missing += [f"data {name}: the record does not name it" for name in cell_data(cell) if name not in inputs]
    roots = _roots(path, results)
    starts = [_start(item, cell, record.trial, roots, results, found) for item in record.inputs if item.name not in cell_data(cell)]
    if found.missing:
        return Rebuilt(trial=None, differences=tuple(found.differences), missing=tuple(found.missing))
    trial = make_trial(
        cell, record.trial, data=[item for item in data if item], starts=[item for item in starts if item],
        work=str(results / FOLDER / cell.cell_id), limits=_limits(path),
    )  # fmt: skip
    if trial.fingerprint != record.fingerprint and len(found.differences) == of_place:
        found.differences.append(f"fingerprint: {record.fingerprint[:DIGITS]} recorded, {trial.fingerprint[:DIGITS]} here")
    return Rebuilt(trial=trial, differences=tuple(found.differences), missing=())


def run_again(trial: Trial, results: Path) -> tuple[int, Path]:
    """Run a rebuilt trial, supervised; return its exit code (130: interrupted, no record) and where its record lies."""
    folder = results.absolute() / FOLDER / trial.parsed_cell.cell_id
    number = next(n for n in count(1) if not (folder / f"trial{trial.trial}-run{n}.json").exists())
    record_path = folder / f"trial{trial.trial}-run{number}.json"
    trial_file = folder / f"trial{trial.trial}-run{number}-logs" / "trial.json"
    save_trial(trial, trial_file)
    return run_single(trial_file, record_path), record_path


# -- the place ---------------------------------------------------------------------------------------------------


def _cell(record: Record, path: Path) -> Cell:
    try:
        cell = record.parsed_cell
    except KeyError:
        raise RecordError(f"{path}: its cell is none that this version knows; seen: stage {record.cell.get('stage')!r}") from None
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RecordError(f"{path}: its cell is none that this version knows; seen: {mistakes}") from None
    if cell.strategy not in all_strategies():
        raise RecordError(
            f"{path}: its strategy is none that this version has; seen: {cell.strategy}; one of {', '.join(all_strategies())}"
        )
    return cell


def _compare_place(record: Record, cell: Cell, found: _Findings) -> None:
    """Code, versions, locks, device, and whether the nodes are real."""
    there, here = record.provenance.get("source") or {}, source()
    name = "package_sha256" if there.get("package_sha256") else "commit"
    if there.get(name) != here[name]:
        found.differences.append(f"code: {_version(there)} recorded, {_version(here)} here; `git checkout` of that commit brings it")
    place = differences([conditions(record)], [conditions_here(cell.settings.device)])
    found.differences += [f"{item.name}: {item.before} recorded, {item.now} here" for item in place]
    if cell.nodes > 1 and not record.simulated_nodes:
        found.differences.append(f"nodes: {cell.nodes} machines recorded; here they would be simulated on one")


def _version(origin: dict[str, object]) -> str:
    commit, package = (str(origin.get(name) or "unknown")[:DIGITS] for name in ("commit", "package_sha256"))
    return f"commit {commit}{' with changes' if origin.get('dirty_diff_sha256') else ''} (package {package})"


def _limits(path: Path) -> Limits:
    """Those of the suite that the record lies in, or the default ones: they end trials and change no number."""
    try:
        return load_plan(Layout(path.absolute().parents[2]).plan).limits
    except (IndexError, UserError):
        return Limits()


# -- data --------------------------------------------------------------------------------------------------------


def _data(item: Input, found: _Findings) -> Input | None:
    """The data set, where the record says it is, or from the cache, or fetched again."""
    if _is_file(Path(item.path), item.sha256):
        return item
    try:
        manifest = fetch(item.name)
    except BenchError as error:
        found.missing.append(f"data {item.name}: {error}")
        return None
    if manifest.sha256 != item.sha256:
        found.differences.append(f"data {item.name}: sha256 {item.sha256[:DIGITS]} recorded, {manifest.sha256[:DIGITS]} here")
    return manifest.as_input()


def _is_file(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


# -- starts ------------------------------------------------------------------------------------------------------


def _start(item: Input, cell: Cell, trial: int, roots: list[Path], results: Path, found: _Findings) -> Input | None:
    """The folder with these very weights; where there is none, another one that stands in its place, as a difference."""
    seen = _seen(item.sha256, _places(item, trial, roots))
    if item.name == "tokenizer" and item.sha256 not in seen.values() and cell.settings.tokenizer_data:
        with suppress(BenchError):
            folder = _trained_tokenizer(cell, item.sha256, results)
            seen[folder] = checkpoint_sha256(folder)
    if not seen:
        maker = item.facts.get("made_by", "unknown")
        found.missing.append(
            f"{item.name}: no folder with the weights {item.sha256[:DIGITS]}, made by {maker}; "
            f"run their suite again (`coati-bench run SUITE`), or bring them to {item.path}"
        )
        return None
    folder, sha256 = next((pair for pair in seen.items() if pair[1] == item.sha256), next(iter(seen.items())))
    if sha256 != item.sha256:
        found.differences.append(f"{item.name}: sha256 {item.sha256[:DIGITS]} recorded, {sha256[:DIGITS]} in {folder}")
    return Input(name=item.name, path=str(folder), sha256=sha256, facts=item.facts)


def _roots(path: Path, results: Path) -> list[Path]:
    """Folders of suites: that of the record, then the others."""
    own = path.absolute().parents
    others = sorted(folder for folder in results.absolute().iterdir() if folder.is_dir()) if results.is_dir() else []
    return list(dict.fromkeys([*own[2:3], *others]))


def _places(item: Input, trial: int, roots: list[Path]) -> Iterator[Path]:
    """Where the weights may lie: as recorded, then as each suite names them."""
    yield Path(item.path)
    maker = str(item.facts.get("made_by") or "")
    if maker and "/" not in maker:
        for layout in map(Layout, roots):
            yield from (layout.warm(maker) / "weights", layout.chained(maker, trial))


def _seen(wanted: str, folders: Iterable[Path]) -> dict[Path, str]:
    """Folders with weights and their sha256, up to the first that is the wanted one (hashing is slow)."""
    found: dict[Path, str] = {}
    for folder in folders:
        if sha256 := _sha256(folder):
            found[folder] = sha256
        if sha256 == wanted:
            break
    return found


def _sha256(folder: Path) -> str | None:
    try:
        return checkpoint_sha256(folder) if folder.is_dir() else None
    except (CheckpointError, OSError):
        return None


def _trained_tokenizer(cell: Cell, sha256: str, results: Path) -> Path:
    """The tokenizer of the cell's data, trained again; kept by the content that is wanted."""
    from bench.models.tokenizer import train_tokenizer

    folder = results.absolute() / FOLDER / "tokenizers" / sha256[:DIGITS]
    if folder.is_dir():
        return folder
    manifests = [fetch(name) for name in cell.settings.tokenizer_data]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft."))
    try:
        train_tokenizer(texts(manifests, 1.0), cell.settings.tokenizer_vocabulary, draft)
        draft.chmod(0o755)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
