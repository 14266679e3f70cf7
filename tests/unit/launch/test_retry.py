"""`retry`: which records and warm starts are set aside, so that the next run makes them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import UserError
from bench.launch.assemble import assemble, make_provenance
from bench.launch.classify import Verdict
from bench.launch.retry import Dropped, set_outcomes_aside
from bench.launch.supervise import leave
from bench.layout import Layout
from bench.matrix import Plan, make_plan
from bench.record import Outcome, write_json
from bench.trial import make_trial

SUITE = """
suite: tiny
axes: {stage: [sft, rm], model: [bloom-tiny], strategy: [naive, ddp]}
settings: {device: cpu, launcher: fork, WARM}
stages: {sft: {steps: 3}, rm: {steps: 3}}
"""


class Ended:
    """A suite whose trials and warm starts have all ended: ok, but for what a test says."""

    def __init__(self, folder: Path, warm_start: str = "shared") -> None:
        self.suite, self.results = folder / "tiny.yaml", folder / "results"
        self.suite.write_text(SUITE.replace("WARM", f"warm_start: {warm_start}"), encoding="utf-8")
        self.plan: Plan = make_plan(self.suite)
        self.layout = Layout(self.results / "tiny")

    def write(self, trials: dict[tuple[str, str], Outcome] | None = None, warm: dict[str, str] | None = None) -> None:
        """Outcomes by (stage, strategy), and by the first letters of a warm start's key."""
        for block in self.plan.blocks:
            for cell_id in block.cells:
                cell = self.plan.cells[cell_id]
                trial = make_trial(cell, 0, data=[], work=str(self.layout.logs(cell_id, 0)), limits=self.plan.limits)
                provenance = make_provenance(trial, command=[], variables={}, started="", ended="")
                verdict = Verdict((trials or {}).get((cell.stage, cell.strategy), "busy"), "so it was")
                record = assemble(trial, verdict, launcher="fork", simulated_nodes=False, attempt=1, provenance=provenance)
                leave(record, self.layout.record(cell_id, 0), Path(trial.work))
            write_json({"records": []}, self.layout.block(block.block_id))
        for one in self.plan.warm:
            outcome = next((outcome for start, outcome in (warm or {}).items() if one.key.startswith(start)), "ok")
            write_json({"key": one.key, "outcome": outcome, "reason": None}, self.layout.warm(one.key) / "done.json")

    def retry(self, *outcomes: str) -> Dropped:
        return set_outcomes_aside(self.suite, set(outcomes), self.results)

    def gone(self) -> set[str]:
        """What has no record, no done.json, no block file any more, as stage-strategy, first word of the key, and stage."""
        cells = {f"{cell.stage}-{cell.strategy}" for key, cell in self.plan.cells.items() if not self.layout.record(key, 0).exists()}
        warm = {one.key.split("-")[0] for one in self.plan.warm if not (self.layout.warm(one.key) / "done.json").exists()}
        return cells | warm | {f"block {it.stage}" for it in self.plan.blocks if not self.layout.block(it.block_id).exists()}


def test_records_with_the_outcome_go_with_their_block_and_are_kept_in_the_logs(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.write({("rm", "ddp"): "timeout", ("sft", "naive"): "error"})
    assert ended.retry("timeout") == Dropped(1, 0)
    assert ended.gone() == {"rm-ddp", "block rm"}
    assert len(list(ended.layout.root.glob("logs/rm-*/0/set-aside*.json"))) == 1


@pytest.mark.parametrize("outcome", ["error", "timeout"])
def test_a_failed_warm_start_goes_with_all_that_could_not_begin_whichever_outcome_is_named(tmp_path: Path, outcome: str) -> None:
    ended = Ended(tmp_path)
    ended.write({("rm", "naive"): "error", ("rm", "ddp"): "error"}, warm={"sft": "timeout"})
    assert ended.retry(outcome) == Dropped(2, 1)
    assert ended.gone() == {"rm-naive", "rm-ddp", "sft", "block rm"}


def test_a_failed_tokenizer_goes_with_the_warm_starts_and_trials_that_needed_it(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    every = {(stage, strategy): "error" for stage in ("sft", "rm") for strategy in ("naive", "ddp")}
    ended.write(every, warm={"tokenizer": "error", "sft": "error"})  # type: ignore[arg-type]
    assert ended.retry("error") == Dropped(4, 2)
    assert len(ended.gone()) == 4 + 2 + 2


def test_a_warm_start_that_went_well_stays_whatever_is_repeated(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.write({("rm", "naive"): "error"})
    assert ended.retry("error", "ok") == Dropped(1, 0)
    assert ended.gone() == {"rm-naive", "block rm"}


def test_a_failed_cell_of_a_chain_goes_with_the_cell_that_was_to_continue_it(tmp_path: Path) -> None:
    ended = Ended(tmp_path, "chain")
    ended.write({("sft", "ddp"): "oom", ("rm", "ddp"): "error", ("rm", "naive"): "timeout"})
    assert ended.retry("oom") == Dropped(2, 0)
    assert ended.gone() == {"sft-ddp", "rm-ddp", "block sft", "block rm"}


def test_nothing_is_touched_where_nothing_ended_so(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.write(warm={"sft": "oom"})
    assert ended.retry("timeout") == Dropped(0, 0)
    assert ended.gone() == set()


def test_blanks_around_an_outcome_mean_nothing_and_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.write({("sft", "ddp"): "timeout"})
    assert ended.retry("error", " timeout") == Dropped(records=1, warm=0)
    with pytest.raises(UserError, match=r"--results .*none: there is no such folder"):
        set_outcomes_aside(ended.suite, {"error"}, tmp_path / "none")
