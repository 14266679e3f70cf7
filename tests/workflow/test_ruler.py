"""The ruler on real trials: real ranks train a real model under the real supervisor, and `compare` judges their records.

Seven trials each of a cell (A), of the same cell again (A'), and with 5 % more time a step (B), interleaved in a seeded order.
Steps end on a beat (tests/paced_rank.py) that leaves the training of a tiny model several times the time it needs. So trials
differ by what clocks, records and statistics do to them, and not by what else a shared machine does meanwhile; a trial that could not
keep the beat, as its rank says, is none and is run again.
`benchmarks/ruler.py` plants real work instead, for a quiet machine or a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from bench.cli import _exit_code
from bench.launch.parent import PRELOAD, ForkParent
from bench.launch.supervise import run_trial
from bench.record import load_record
from bench.report.compare import compare_sets
from bench.trial import Trial
from tests.paced_rank import LATE, UNTIMED_STEPS
from tests.trials import tiny_cell, tiny_trial

ROOT = Path(__file__).parents[2]
TRIALS, SLOWDOWN, BEAT_SECONDS = 7, 1.05, 0.05
MOST_LATE = 21
"""Late trials over all sets from which on the machine is too busy for this test."""
CELL = tiny_cell("sft", micro_batch=2, global_batch=2, sequence_length=128, rows=80, held_out_rows=8, steps=18, lap_steps=1)
SETS = {"baseline": BEAT_SECONDS, "again": BEAT_SECONDS, "slower": BEAT_SECONDS * SLOWDOWN}


def paced(folder: Path, name: str, number: int, attempt: int) -> Trial:
    trial = tiny_trial(CELL, folder / f"work-{name}-{number}-{attempt}", trial=number)
    data = [dataclasses.replace(item, facts={"beat_seconds": SETS[name]}) for item in trial.data]
    return dataclasses.replace(trial, data=data)


def run_on_the_beat(root: Path, name: str, number: int, parent: ForkParent, late: list[str]) -> None:
    """Run one trial until it kept the beat; `late` gathers those that did not."""
    while len(late) < MOST_LATE:
        path = root / name / "records" / CELL.cell_id / f"{number}.json"
        record = run_trial(paced(root, name, number, len(late)), path, parent=parent)
        if record.outcome == "ok":
            return read_as_measured(path)
        assert LATE in (record.reason or ""), record.reason
        late.append(record.reason or "")
        path.unlink()
    pytest.skip(f"{LATE} in {len(late)} trials; the last one: {late[-1]}")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders baseline, again and slower, each with 7 records."""
    root = tmp_path_factory.mktemp("ruler")
    launch = {"program": "tests.paced_rank", "search_path": (str(ROOT),), "preload": (*PRELOAD, "peft.tuners.lora.bnb")}
    late: list[str] = []
    with ForkParent(root / "parent.log", **launch) as parent:
        for number in range(TRIALS):
            for name in random.Random(number).sample(list(SETS), len(SETS)):
                run_on_the_beat(root, name, number, parent, late)
    return root


def read_as_measured(path: Path) -> None:
    """Forked ranks make no timing claims in a report; here their times are the very thing that is tested."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"launcher": "torchrun"}), encoding="utf-8")


def test_real_trials_of_one_cell_against_others_of_it_are_equal(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["compare", str(sets / "baseline"), str(sets / "again")]) == 0
    assert "0 regressions, 1 equal" in capsys.readouterr().out
    [change] = compare_sets(sets / "baseline", sets / "again").cells
    assert change.losses is not None
    assert change.losses.state == "identical"


def test_a_planted_slowdown_of_five_percent_is_found_at_seven_and_seven_real_trials(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(["compare", str(sets / "baseline"), str(sets / "slower"), "--junit", str(tmp_path / "junit.xml")]) == 1
    assert "slower: 0.95" in capsys.readouterr().out
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text(encoding="utf-8")
    [change] = compare_sets(sets / "baseline", sets / "slower").cells
    assert change.speed is not None
    assert len(change.speed.ratios) == TRIALS
    assert change.speed.middle == pytest.approx(1 / SLOWDOWN, rel=0.01)
    assert change.losses is not None
    assert change.losses.state == "identical"


def test_a_clock_reads_what_was_planted(sets: Path) -> None:
    """The laps after the warm-up add up to beats x steps, whatever the machine did."""
    for name, beat in SETS.items():
        for number in range(TRIALS):
            part = load_record(sets / name / "records" / CELL.cell_id / f"{number}.json").parts[0]
            timed = [lap.seconds for lap in part.laps[UNTIMED_STEPS:]]
            assert sum(timed) == pytest.approx(beat * len(timed), rel=0.02)
