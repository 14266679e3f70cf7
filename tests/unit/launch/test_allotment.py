"""The time limit of an allocation, as squeue tells of it, and what its end means for the trial that had all of it."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from bench.launch.allotment import Allotment


def in_words(when: float) -> str:
    return datetime.fromtimestamp(when).strftime("%Y-%m-%dT%H:%M:%S")  # noqa: DTZ006 (as squeue, in local time)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Let squeue say something to who is inside job 7."""

    def say(text: str, code: int = 0) -> None:
        (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$*" = "-h -j 7 -o %S %e" ] && echo "{text}"\nexit {code}\n')
        (tmp_path / "squeue").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return say


def test_the_end_of_a_time_limit_is_a_timeout_that_names_job_and_limit(squeue):
    now = time.time()
    squeue(f"{in_words(now - 90)} {in_words(now)}")
    verdict = Allotment.here().verdict("SIGTERM")
    assert verdict.outcome == "timeout"
    assert verdict.reason == "the time limit of Slurm's job 7 ended it: 90 s, all of which it had; a longer one would be right"


@pytest.mark.parametrize(("asked", "left"), [("SIGTERM", 60), ("SIGINT", 0)])
def test_who_is_stopped_earlier_or_by_hand_did_not_run_out_of_time(squeue, asked, left):
    now = time.time()
    squeue(f"{in_words(now - 90)} {in_words(now + left)}")
    assert Allotment.here().verdict(asked) is None


@pytest.mark.parametrize(("text", "code"), [("2026-11-30T08:00:00 NONE", 0), ("", 1), ("N/A N/A", 0)])
def test_without_a_limit_or_an_answer_there_is_no_allotment(squeue, text, code):
    squeue(text, code)
    assert Allotment.here() is None


def test_outside_of_a_job_nobody_is_asked(squeue, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    assert Allotment.here() is None
