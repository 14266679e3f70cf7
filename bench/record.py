"""The record: what one trial left behind, whatever happened to it. Torch-free.

A record is assembled from parts (what one rank saw), written once and never rewritten. NaN and infinity never enter it.
"""

from __future__ import annotations

import json
import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bench.cell import SCHEMA_MAJOR, STRICT, Cell, cell_from_json
from bench.errors import RecordError, UserError
from bench.files import replace

SCHEMA = f"coati-bench/record/{SCHEMA_MAJOR}"

Outcome = Literal["ok", "diverged", "oom", "timeout", "busy", "cancelled", "invalid", "error"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "diverged", "oom", "timeout", "busy", "cancelled", "invalid", "error")

SIDE_BY_SIDE = "side by side"
"""Flag: other trials may have run beside this one on the same devices."""

EvidenceState = Literal["refuted", "shown", "not applicable"]
EVIDENCE_STATES: tuple[EvidenceState, ...] = ("refuted", "shown", "not applicable")

Finite = Annotated[float, Field(allow_inf_nan=False, strict=False)]
Bytes = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Lap:
    """One clock reading: the steps (PPO: iterations) since the last one, between two synchronised edges of one rank."""

    first_step: int
    """Number of the first step in the lap, from 0."""
    steps: int
    """Steps (PPO: iterations) in the lap."""
    seconds: Finite
    """Host monotonic time, device synchronised at both edges; evaluation, logging and checkpoints are outside."""
    counts: dict[str, int]
    """Work of this rank: loss_tokens, tokens (not padding), padded_tokens (with padding), sequences; PPO: prompt_tokens,
    response_tokens, learned_tokens."""
    phases: dict[str, Finite] = field(default_factory=dict)
    """Seconds by phase (PPO), the residual as `other`."""
    opened: Finite | None = None
    """When the lap began, in seconds since the epoch by the rank's host: which readings of the devices belong to it."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of one rank over the measured loop; null with a reason in `notes` where it cannot be read."""

    peak_allocated_bytes: Bytes | None = None
    """Torch allocator, live bytes."""
    peak_reserved_bytes: Bytes | None = None
    """Torch allocator, cached bytes."""
    host_peak_bytes: Bytes | None = None
    """Peak resident set of the rank's process."""
    phases_peak_allocated_bytes: dict[str, Bytes] = field(default_factory=dict)
    """Allocator peak by phase."""
    notes: list[str] = field(default_factory=list)


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Traffic:
    """Collectives of one kind."""

    count: int
    bytes: Bytes
    """Of the whole tensors: what an all-reduce or reduce-scatter is given, what an all-gather gives."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must be seen if the strategy is active; what each means: docs/evidence.md."""

    what: str
    """trainable, parameters, frozen, gradients, optimizer, placement, reduced, gathered, exchanged, gradient norm, moved, adapters,
    unmoved, agreement, micro-steps."""
    model: str
    """policy, critic, reward, reference."""
    state: EvidenceState
    seen: Finite | None = None
    expected: Finite | None = None
    unit: str = ""
    """Of both numbers: bytes, parameters, tensors, steps, or a share of something."""
    text: str
    """A sentence for a person."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one rank can show for its strategy being active: read from tensors and collectives, never from the strategy's own flags."""

    checks: list[Check]
    collectives: dict[str, dict[str, Traffic]] = field(default_factory=dict)
    """Model -> kind -> traffic of its traced step, from the first forward pass to the end of the update."""
    traced: str = ""
    """Which step was traced. It is in no lap that the report measures."""

    @property
    def state(self) -> EvidenceState:
        """Refuted if one check is, shown if one is shown."""
        states = {check.state for check in self.checks}
        return next((state for state in EVIDENCE_STATES[:2] if state in states), EVIDENCE_STATES[2])

    @property
    def refuted(self) -> list[Check]:
        """The checks that speak against it."""
        return [check for check in self.checks if check.state == "refuted"]


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank saw."""

    rank: int
    local_rank: int
    node: int
    world_size: int
    """From the process group, never from the environment."""
    hostname: str
    pid: int
    outcome: Outcome
    reason: str | None = None
    phase: str = "start"
    """Where the rank was when it ended: start, load, train, evaluate, save, evidence, done."""
    step: int = 0
    """Steps (PPO: iterations) finished."""
    resumed_step: int | None = None
    """Step (PPO: iteration) that it went on from after it had been stopped; laps and series before that are those of the stopped try."""
    laps: list[Lap] = field(default_factory=list)
    """All of them, warm-up included; the report cuts."""
    series: dict[str, list[Finite]] = field(default_factory=dict)
    """Per step: loss, gradient_norm, learning_rate; RM: accuracy, margin; PPO also per iteration: reward, kl, ...
    Values of the whole job (already reduced over ranks)."""
    held_out: dict[str, Finite] = field(default_factory=dict)
    """Held-out metrics, named `<metric>_before` and `<metric>_after`, measured outside the laps."""
    seconds: dict[str, Finite] = field(default_factory=dict)
    """Outside the laps: start, load, time_to_first_step, evaluate, save, evidence."""
    memory: Memory = field(default_factory=Memory)
    evidence: Evidence | None = None
    """That the strategy was active; null where the rank did not get to the end of training."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Parameters (total, trainable), initial_weights_sha256, optimizer in force, lora {rank, alpha, scaling, targets},
    dtypes, switches, device name, sampled texts."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Input:
    """A data set or a start that a trial reads, by content."""

    name: str
    """Data name, or the role of a start: tokenizer, policy, reward."""
    path: str
    """File or folder; not part of the fingerprint."""
    sha256: Sha256
    facts: dict[str, Any] = field(default_factory=dict)
    """Data: rows, rejected, bytes, licence, source, revision. Starts: stage, made by which cell."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Record:
    """One trial. `cell` is flat: axes, then settings."""

    schema: Literal["coati-bench/record/1"] = SCHEMA  # type: ignore[assignment]
    cell: dict[str, Any]
    cell_id: str
    fingerprint: Sha256
    trial: int
    seed: int
    attempt: int = 1
    """How many tries it took; only launch and network incidents are tried again."""
    launcher: str
    emulated: bool
    """ColossalAI ran on a CPU behind stand-ins: times and memory mean nothing."""
    simulated_nodes: bool
    """The nodes were agents on one machine: times mean nothing."""
    resumed_step: int | None = None
    """Step (PPO: iteration) that the trial went on from after it had been stopped; its times and memory are then never ranked."""
    outcome: Outcome
    reason: str | None = None
    """Why the outcome is not ok: rank, phase, step, exit code, requested bytes, last log lines."""
    flags: list[str] = field(default_factory=list)
    """What a reader must know: indicative, semantics switches, missing ranks, forced optimizer, ..."""
    inputs: list[Input] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    observed: dict[str, Any] = field(default_factory=dict)
    """What the supervisor saw from outside: device_memory_peak_bytes by device, host_peak_bytes, devices {uuid: {power, clocks,
    energy_joules, laps_energy_joules, unknown: why a value is null}}, telemetry_file, seconds, exit codes, time_to_detection_seconds."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, lock hash, commit, machine of every node, command, UTC start and end."""

    @property
    def parsed_cell(self) -> Cell:
        """The cell as a value."""
        return cell_from_json(self.cell)

    @property
    def lead(self) -> Part | None:
        """The part with the job's series: that of the lowest rank that left one."""
        return min(self.parts, key=lambda part: part.rank, default=None)


_record_adapter = TypeAdapter(Record)
_part_adapter = TypeAdapter(Part)


def record_schema() -> dict[str, Any]:
    """JSON Schema of a record."""
    return _record_adapter.json_schema()


def save_record(record: Record, path: Path) -> None:
    """Write `record` atomically, once. Raises RecordError if `path` holds a record already."""
    if path.exists():
        raise RecordError(f"{path}: a record is never rewritten; remove it (`coati-bench retry`) to run the trial again")
    write_json(_record_adapter.dump_python(record, mode="json"), path)


def load_record(path: Path) -> Record:
    """Return the record in `path`. Raises RecordError with the first thing that is wrong."""
    return _load(_record_adapter, path, "record")


def save_part(part: Part, path: Path) -> None:
    """Write what one rank saw, atomically; a later part of the same rank replaces it."""
    write_json(_part_adapter.dump_python(part, mode="json"), path)


def load_part(path: Path) -> Part:
    """Return the part in `path`. Raises RecordError."""
    return _load(_part_adapter, path, "part")


def _load(adapter: TypeAdapter[Any], path: Path, what: str) -> Any:
    try:
        return adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise RecordError(f"{path}: not a {what}; {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Where the content of a file is first wrong, how, and what was seen there."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "(file)"
    seen = first["input"].decode("utf-8", "replace") if isinstance(first["input"], bytes) else str(first["input"])
    return f"at {where}: {first['msg']}; seen: {seen[:200]!r}"


def write_json(content: Any, path: Path) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, and NaN is refused before anything is written.

    A link to a file stays a link, and the file is replaced. Raises UserError for what is there and no file: it would be lost.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = _replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, text)


def _replaceable(path: Path) -> Path:
    """`path`, or the file that it is a link to."""
    if os.path.lexists(path) and not path.is_file():
        what = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "a device, pipe or socket"
        raise UserError(f"{path}: cannot be replaced by a file; seen: {what}; the path of a file, or of none yet, would be right")
    return Path(os.path.realpath(path)) if path.is_symlink() else path
