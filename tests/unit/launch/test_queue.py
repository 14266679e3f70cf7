"""Jobs of a suite in Slurm's queue, as squeue tells of them: whose they are, which are held, and which were preempted for good."""

from __future__ import annotations

import pytest

from bench.errors import MachineError
from bench.launch.queue import PreemptionWatch, Queue

SQUEUE = """#!/bin/sh
[ -e "{folder}/silent" ] && {{ echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }}
while [ "$1" != "-t" ]; do shift; done
case ",$2," in *,PREEMPTED,*) cat "{folder}/preempted";; *) cat "{folder}/held";; esac
"""


class Cluster:
    """What squeue answers: jobs of a suite and of others."""

    def __init__(self, folder, queue):
        self._folder, self._prefix = folder, queue.prefix
        self.say()

    def say(self, *, held=(), preempted=(), others=("77",)):
        for name, jobs in (("held", held), ("preempted", preempted)):
            lines = [*(f"{job} {self._prefix}_block" for job in jobs), *(f"{job} somebody-elses" for job in others)]
            (self._folder / name).write_text("".join(f"{line}\n" for line in lines))

    def fall_silent(self):
        (self._folder / "silent").touch()

    def answer(self):
        (self._folder / "silent").unlink()


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "results" / "small")


@pytest.fixture
def cluster(queue, tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(SQUEUE.format(folder=tmp_path))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return Cluster(tmp_path, queue)


def test_only_jobs_of_this_suite_are_seen(queue, cluster):
    cluster.say(held=["1", "2"])
    assert queue.held() == ["1", "2"]


def test_a_job_that_slurm_starts_again_is_not_lost(queue, cluster):
    cluster.say(held=["1"], preempted=["1", "2"])
    assert queue.preempted() == ["2"]


def test_a_job_that_was_preempted_for_good_is_lost_once_nothing_else_is_held(queue, cluster):
    watch = PreemptionWatch(queue, look=0)
    assert watch.lost() == []
    cluster.say(held=["2"], preempted=["1"])
    assert watch.lost() == []
    cluster.say(preempted=["1"])
    assert watch.lost() == ["1"]


def test_what_was_preempted_before_is_of_an_earlier_driver(queue, cluster):
    cluster.say(preempted=["1"])
    watch = PreemptionWatch(queue, look=0)
    assert watch.lost() == []
    cluster.say(preempted=["1", "2"])
    assert watch.lost() == ["2"]


def test_a_scheduler_that_does_not_answer_loses_nothing(queue, cluster):
    watch = PreemptionWatch(queue, look=0)
    cluster.say(preempted=["1"])
    cluster.fall_silent()
    assert watch.lost() == []
    with pytest.raises(MachineError, match=r"squeue does not answer: .*Unable to contact slurm controller"):
        queue.preempted()
    cluster.answer()
    assert watch.lost() == ["1"]


def test_the_scheduler_is_not_asked_all_the_time(queue, cluster):
    watch = PreemptionWatch(queue, look=3600)
    cluster.say(preempted=["1"])
    assert watch.lost() == []
