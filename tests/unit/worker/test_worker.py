"""How a rank's trial can end, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager

import pytest
import torch

import bench.worker as worker
from bench.errors import DataError, MachineError
from bench.measure.shape import shape_of, shape_of_config
from bench.record import load_part
from bench.stages.base import StepReport
from tests.trials import fork_ranks, only, run_forked, tiny_cell, tiny_trial


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("worker")


class FakeStage:
    """A stage of five steps that does as it is told."""

    total = 5

    def __init__(self, place, *, losses=None, raises=None, at=None, held_out=1.0):
        self.facts = {"parameters": {"total": 1, "trainable": 1}}
        self._place, self._losses, self._raises, self._at, self._held_out = place, losses, raises, at, held_out

    def advance(self, index):
        if self._raises is not None and index == (self._at or 0):
            raise self._raises
        loss = torch.tensor(self._losses[index] if self._losses else 1.0 / (index + 1))
        return StepReport(steps=[{"loss": loss, "gradient_norm": torch.tensor(math.inf if index == 1 else 0.5)}], counts={"tokens": 3})

    def evaluate(self):
        return {"loss": self._held_out}

    def save(self, folder):
        raise AssertionError("nothing to save")


@contextmanager
def stage(**behaviour):
    original = worker.build_stage
    worker.build_stage = lambda _, __, place: FakeStage(place, **behaviour)
    try:
        yield
    finally:
        worker.build_stage = original


def end_of(root, name, **behaviour):
    trial = tiny_trial(tiny_cell("sft", steps=5, lap_steps=2, **behaviour.pop("cell", {})), root / name)
    with stage(**behaviour):
        codes = fork_ranks(trial)
    return codes, [load_part(trial.part_path(rank)) for rank in range(len(codes))], trial


def test_a_good_trial_leaves_laps_series_and_held_out_values(root):
    codes, (part,), _ = end_of(root, "good")
    assert codes == [0]
    assert part.outcome == "ok"
    assert part.phase == "done"
    assert part.step == 5
    assert [(lap.first_step, lap.steps) for lap in part.laps] == [(0, 2), (2, 2), (4, 1)]
    assert [lap.counts["tokens"] for lap in part.laps] == [6, 6, 3]
    assert part.series["loss"] == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert part.held_out == {"loss_before": 1.0, "loss_after": 1.0}
    assert {"start", "load", "time_to_first_step", "evaluate"} <= part.seconds.keys()


def test_a_norm_that_is_not_finite_is_no_divergence_and_never_reaches_json(root):
    _, (part,), trial = end_of(root, "norm")
    assert part.series["gradient_norm"] == [0.5, worker.LARGEST, 0.5, 0.5, 0.5]
    assert part.facts["non_finite"] == {"gradient_norm": [1]}
    json.loads(trial.part_path(0).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence_with_its_step(root, value):
    codes, (part,), _ = end_of(root, f"diverged{value}", losses=[2.0, 1.0, 1.5, value, 9.0])
    assert codes == [0]
    assert part.outcome == "diverged"
    assert part.reason == f"loss is {value} at step 3"
    assert part.step == 3
    assert part.series["loss"] == [2.0, 1.0, 1.5]
    assert [lap.steps for lap in part.laps] == [2]


def test_all_ranks_agree_on_divergence(root):
    codes, parts, _ = end_of(root, "agreed", losses=[1.0, math.nan, 1.0, 1.0, 1.0], cell={"strategy": "ddp", "nodes": 2})
    assert codes == [0, 0]
    assert {part.reason for part in parts} == {"loss is nan at step 1"}


def test_a_held_out_value_that_is_not_finite_is_divergence(root):
    _, (part,), _ = end_of(root, "held-out", held_out=math.nan)
    assert part.outcome == "diverged"
    assert part.reason == "held-out loss before training is nan"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."), "2.00 GiB"),
        (MemoryError(), "an unknown amount"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "4.00 KiB"),
    ],
)
def test_out_of_memory_is_an_outcome_with_bytes_phase_and_step(root, error, asked):
    codes, (part,), trial = end_of(root, f"oom-{type(error).__name__}", raises=error, at=4)
    assert codes == [75]
    assert part.outcome == "oom"
    assert part.reason == f"out of memory in phase train at step 4: {asked} requested"
    assert part.step == 4
    assert len(part.laps) == 2
    assert "Traceback" in trial.log_path(0).read_text()


def test_memory_that_really_runs_out_is_out_of_memory(root):
    class Greedy(FakeStage):
        def advance(self, index):
            return torch.empty(1 << 55, dtype=torch.uint8)

    original = worker.build_stage
    worker.build_stage = lambda _, __, place: Greedy(place)
    trial = tiny_trial(tiny_cell("sft", steps=5), root / "greedy")
    try:
        assert fork_ranks(trial) == [75]
    finally:
        worker.build_stage = original
    part = load_part(trial.part_path(0))
    assert part.outcome == "oom"
    assert f"{1 << 15}.00 TiB requested" in part.reason


def test_any_other_error_has_one_line_in_the_part_and_a_traceback_in_the_log(root):
    codes, (part,), trial = end_of(root, "error", raises=ZeroDivisionError("two\nlines"), at=2)
    assert codes == [1]
    assert part.outcome == "error"
    assert part.reason == "ZeroDivisionError: two lines"
    assert "Traceback" in trial.log_path(0).read_text()


def test_a_users_mistake_is_told_in_its_own_words(root):
    codes, (part,), _ = end_of(root, "user", raises=DataError("too few rows; seen: 3; 4 would be right"))
    assert codes == [1]
    assert part.reason == "too few rows; seen: 3; 4 would be right"


def test_too_few_rows_end_in_an_error_that_says_so(root):
    trial = tiny_trial(tiny_cell("sft", steps=2, rows=12, held_out_rows=4, global_batch=16), root / "few")
    (part,) = run_forked(trial)
    assert part.outcome == "error"
    assert part.reason == "too few training rows for one global batch: 8 rows, 16 needed; use more data, or lower global_batch"
    assert part.phase == "load"


def test_more_held_out_rows_than_data_end_in_an_error_that_says_so(root):
    (part,) = run_forked(tiny_trial(tiny_cell("sft", steps=2, rows=12, held_out_rows=12), root / "none-left"))
    assert part.outcome == "error"
    assert "cannot hold out 12 rows: the data has 12" in part.reason


def test_a_cuda_trial_without_cuda_is_an_error_that_says_what_is_missing(root):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (part,) = run_forked(tiny_trial(tiny_cell("sft", steps=2, device="cuda", launcher="torchrun"), root / "cuda"))
    assert part.outcome == "error"
    assert part.reason.startswith("device cuda:0 is not there; seen: 0 CUDA devices")


def test_the_heartbeat_says_phase_and_step(root, tmp_path):
    heart = worker.Heartbeat(tmp_path / "heartbeat0.json")
    heart.enter("train", 5)
    assert json.loads((tmp_path / "heartbeat0.json").read_text()) == {"phase": "train", "step": 5}
    os.utime(tmp_path / "heartbeat0.json", (1, 1))
    heart.beat()
    assert (tmp_path / "heartbeat0.json").stat().st_mtime == 1
    heart._last -= worker.BEAT_SECONDS
    heart.beat()
    assert (tmp_path / "heartbeat0.json").stat().st_mtime > 1
    heart.enter("save", 12_345)
    heart.enter("done", 1)
    assert json.loads((tmp_path / "heartbeat0.json").read_text()) == {"phase": "done", "step": 1}, "nothing is left of a longer beat"


def test_a_finished_trial_left_a_last_beat(root):
    _, _, trial = end_of(root, "beat")
    assert json.loads(trial.heartbeat_path(0).read_text()) == {"phase": "done", "step": 5}


def test_choosing_a_device_that_is_not_there_is_a_machine_error():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(MachineError, match="CUDA devices"):
        worker.choose_device("cuda", count)


def test_equal_seeds_give_equal_series_and_other_seeds_others(root):
    cell = tiny_cell("sft", steps=3, global_batch=8, sequence_length=64, learning_rate=1e-2)
    series = [only(run_forked(tiny_trial(cell, root / f"seed{name}", trial=k))).series for name, k in (("a", 0), ("b", 0), ("c", 1))]
    assert series[0] == series[1]
    assert series[0]["loss"] != series[2]["loss"]


def test_a_part_has_the_facts_that_reports_read(root):
    part = only(run_forked(tiny_trial(tiny_cell("sft", steps=1, semantics="coati-0.2.8", lora_rank=4), root / "facts")))
    assert part.facts["parameters"]["trainable"] < part.facts["parameters"]["total"]
    assert len(part.facts["initial_weights_sha256"]) == 64
    assert shape_of_config(part.facts["model_config"]) == shape_of("bloom-tiny")
    assert 8 < part.facts["longest_sequence"] <= 512
    assert part.facts["semantics_switches"] == ["lora-alpha-1", "loss-mean-per-micro-batch"]
    assert part.facts["lora"]["scaling"] == 0.25
    assert part.facts["versions"]["torch"] == torch.__version__
    assert part.facts["optimizer"] == "adamw"
    assert part.memory.host_peak_bytes > 1 << 20
    assert part.memory.peak_allocated_bytes is None
    assert part.memory.notes
