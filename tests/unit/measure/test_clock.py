"""The clocks on synthetic time: laps, phases and throughput come out as they were put in, to the last digit."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import worker
from bench.measure.clock import OTHER, LapClock, PhaseClock
from bench.measure.memory import MemoryWatch
from bench.record import Part, load_part
from bench.report.metrics import METRICS
from bench.report.registry import Row, Trial
from bench.stages.base import Place, StepReport
from bench.trial import make_trial
from bench.worker import Rank
from tests.trials import tiny_cell
from tests.unit.report.trial_factory import make_record

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Time:
    """Host time that passes only when told; a device that is given work in seconds and does it one after another."""

    def __init__(self) -> None:
        self.now, self.device_free, self.synchronisations = 1000.0, 0.0, 0
        self.allocated = self.peak = 0

    def pass_by(self, seconds: float) -> None:
        """The host is busy."""
        self.now += seconds

    def launch(self, seconds: float) -> None:
        """Give work to the device; the host goes on at once."""
        self.device_free = max(self.now, self.device_free) + seconds

    def synchronise(self, *_: object) -> None:
        """The host waits for the device."""
        self.synchronisations += 1
        self.now = max(self.now, self.device_free)

    def hold(self, size: int) -> None:
        """Allocate, and let go again."""
        self.peak = max(self.peak, self.allocated + size)


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Time and a CUDA device that are made up; torch's own functions are all that is replaced."""
    made = Time()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, _: object) -> None:
            self.at = max(made.now, made.device_free)

        def synchronize(self) -> None:
            made.now = max(made.now, self.at)

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(time, "time", lambda: made.now + 1e9)
    for name, value in {
        "synchronize": made.synchronise, "Event": Event, "current_stream": lambda _: None, "max_memory_allocated": lambda _: made.peak,
        "max_memory_reserved": lambda _: made.peak, "reset_peak_memory_stats": lambda _: setattr(made, "peak", made.allocated),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_a_lap_is_the_time_between_its_edges(synthetic: Time) -> None:
    clock = LapClock(CPU)
    clock.start()
    synthetic.pass_by(2.5)
    assert clock.stop() == 2.5
    assert clock.opened == 1000.0 + 1e9


def test_a_lap_waits_for_the_device_at_its_edges_and_only_there(synthetic: Time) -> None:
    clock = LapClock(CUDA)
    synthetic.launch(4.0)  # left over from before
    clock.start()
    for _ in range(5):
        synthetic.launch(1.0)
        synthetic.pass_by(0.01)
    assert synthetic.now == 1004.05, "the host ran ahead"
    assert clock.stop() == 5.0
    assert synthetic.synchronisations == 2


def test_a_lap_that_was_not_opened_cannot_be_closed(synthetic: Time) -> None:
    clock = LapClock(CPU)
    clock.start()
    clock.stop()
    with pytest.raises(AssertionError, match="without start"):
        clock.stop()


def test_phases_on_the_cpu_add_up_to_the_whole_with_the_rest_as_other(synthetic: Time) -> None:
    clock = PhaseClock(CPU)
    clock.start()
    for seconds in (1.0, 2.0):
        with clock.phase("rollout"):
            synthetic.pass_by(seconds)
        synthetic.pass_by(0.25)
    with clock.phase("learn"):
        synthetic.pass_by(4.0)
    assert clock.read() == {"rollout": 3.0, "learn": 4.0, OTHER: 0.5}


def test_phases_of_a_device_are_its_own_time_not_the_host_s(synthetic: Time) -> None:
    clock = PhaseClock(CUDA)
    clock.start()
    with clock.phase("rollout"):
        synthetic.launch(3.0)
        synthetic.pass_by(0.1)  # the host is through long before the device
    synthetic.launch(0.5)
    with clock.phase("learn"):
        synthetic.launch(2.0)
        synthetic.pass_by(0.1)
    assert synthetic.now == pytest.approx(1000.2)
    assert clock.read() == pytest.approx({"rollout": 3.0, "learn": 2.0, OTHER: 0.5})
    assert synthetic.synchronisations == 0, "events are waited for, the device is not"


def test_a_device_that_waits_for_the_host_has_that_time_in_the_phase(synthetic: Time) -> None:
    clock = PhaseClock(CUDA)
    clock.start()
    with clock.phase("sampling"):
        synthetic.pass_by(1.0)
        synthetic.launch(0.5)
    assert clock.read() == pytest.approx({"sampling": 1.5, OTHER: 0.0})


def test_each_phase_has_its_own_peak_and_the_largest_is_the_loop_s(synthetic: Time) -> None:
    clock, watch = PhaseClock(CUDA), MemoryWatch(CUDA)
    synthetic.allocated = 100
    watch.start()
    for _ in range(2):
        clock.start()
        with clock.phase("rollout"):
            synthetic.hold(500)
        with clock.phase("learn"):
            synthetic.hold(300)
        watch.note(clock.peaks)
    memory = watch.read()
    assert memory.phases_peak_allocated_bytes == {"rollout": 600, "learn": 400}
    assert memory.peak_allocated_bytes == 600


def test_a_step_that_runs_out_of_memory_leaves_what_the_allocator_held(
    synthetic: Time, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    trial = make_trial(tiny_cell("sft", strategy="ddp", steps=5, lap_steps=5), 0, work=str(tmp_path))

    class Greedy(TimedStage):
        def advance(self, index: int) -> StepReport:
            synthetic.hold(700)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 2.00 GiB")

    def train(rank: Rank) -> None:
        rank.found.watch = MemoryWatch(CUDA)
        rank._evidence = SimpleNamespace(begin=lambda: None, tracing=lambda _: contextlib.nullcontext())
        rank._train(Greedy(synthetic, [0.5] * 5, 1), Place(device=CUDA, rank=0, world_size=1), SimpleNamespace(), 0)

    monkeypatch.setattr(Rank, "run", train)
    assert worker.run_rank(trial) == worker.EXIT_OOM
    part = load_part(trial.part_path(0))
    assert (part.outcome, part.reason) == ("oom", "out of memory in phase train at step 0: 1.00 GiB requested")
    assert part.memory.peak_allocated_bytes == 700


def test_where_no_step_was_finished_no_peak_is_told(synthetic: Time) -> None:
    watch = MemoryWatch(CUDA)
    watch.start()
    memory = watch.read()
    assert (memory.peak_allocated_bytes, memory.peak_reserved_bytes) == (None, None)
    assert "no allocator peaks: no step was finished" in memory.notes


def test_phases_do_not_nest(synthetic: Time) -> None:
    clock = PhaseClock(CPU)
    clock.start()
    with clock.phase("one"), pytest.raises(AssertionError, match="phase two inside phase one"), clock.phase("two"):
        pass


class TimedStage:
    """Steps that take what they are told on the synthetic device, and count what they are told."""

    def __init__(self, made: Time, seconds: list[float], tokens: int) -> None:
        self.total, self._time, self._seconds, self._tokens = len(seconds), made, seconds, tokens

    def advance(self, index: int) -> StepReport:
        self._time.launch(self._seconds[index])
        self._time.pass_by(0.001)
        counts = {"loss_tokens": self._tokens, "tokens": 2 * self._tokens, "padded_tokens": 4 * self._tokens, "sequences": 8}
        return StepReport(steps=[{"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-5}], counts=counts)


def run_rank(synthetic: Time, monkeypatch: pytest.MonkeyPatch, folder: object, number: int, seconds: list[float], tokens: int) -> Rank:
    """The worker's measured loop of one rank, on a synthetic CUDA device."""
    monkeypatch.setenv("RANK", str(number))
    rank = Rank(make_trial(tiny_cell("sft", strategy="ddp", nodes=2, steps=len(seconds), lap_steps=5), 0, work=str(folder)))
    rank.found.watch = MemoryWatch(CUDA)
    rank._evidence = SimpleNamespace(begin=lambda: None, end=lambda _: None)
    place = Place(device=CUDA, rank=number, world_size=2)
    never = SimpleNamespace(is_due=lambda *_: synthetic.pass_by(7.0))  # time between two laps counts for nothing
    rank._train(TimedStage(synthetic, seconds, tokens), place, never, 5)
    return rank


@pytest.fixture
def job(synthetic: Time, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Trial:
    """Two ranks of 60 steps after 5 resumed ones: 0.5 s a step and 100 loss tokens; the second takes 0.6 s and sees 50."""
    parts = []
    for number, (seconds, tokens) in enumerate([(0.5, 100), (0.6, 50)]):
        rank = run_rank(synthetic, monkeypatch, tmp_path, number, [seconds] * 65, tokens)
        parts.append(Part(rank=number, local_rank=0, node=number, world_size=2, hostname="h", pid=1, outcome="ok", laps=rank.found.laps,
                          series=rank.found.series))  # fmt: skip
    record = make_record(tiny_cell("sft", strategy="ddp", nodes=2, steps=65, device="cuda", launcher="torchrun", precision="bf16-master"))
    record = dataclasses.replace(record, parts=parts)
    return Trial(Row(record, record.parsed_cell, ""))


def test_laps_of_the_worker_s_loop_are_the_seconds_of_their_steps(job: Trial, synthetic: Time) -> None:
    for part, seconds in zip(job.record.parts, (0.5, 0.6), strict=True):
        assert [lap.first_step for lap in part.laps] == list(range(5, 65, 5))
        assert [lap.seconds for lap in part.laps] == pytest.approx([5 * seconds] * 12)
        assert {lap.counts["sequences"] for lap in part.laps} == {40}
    assert synthetic.synchronisations == 2 * 2 * 12, "twice a lap: at its edges"


def test_throughput_is_the_sum_of_work_over_the_time_of_the_slowest_rank(job: Trial) -> None:
    assert METRICS["loss_tokens_per_second"].compute(job) == pytest.approx((100 + 50) / 0.6)
    assert METRICS["tokens_per_second"].compute(job) == pytest.approx(2 * (100 + 50) / 0.6)
    assert METRICS["loss_tokens_per_second_per_device"].compute(job) == pytest.approx((100 + 50) / 0.6 / 2)
    assert METRICS["step_seconds"].compute(job) == pytest.approx(0.6)
    assert METRICS["straggler_ratio"].compute(job) == pytest.approx(0.6 / 0.55)
    assert METRICS["padding_efficiency"].compute(job) == pytest.approx(0.5)


def test_a_mean_of_rates_would_have_been_another_number(job: Trial) -> None:
    mean_of_rates = 100 / 0.5 + 50 / 0.6
    assert METRICS["loss_tokens_per_second"].compute(job) < 0.9 * mean_of_rates
