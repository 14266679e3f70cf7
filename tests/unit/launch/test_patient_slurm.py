"""The plugin for Slurm, mended: silence is no answer."""

from __future__ import annotations

import asyncio
import inspect
import logging

import pytest

from bench.launch.patient_slurm import NO_ANSWER, patient, remembered


def test_a_query_returns_only_with_an_answer_and_the_silence_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([NO_ANSWER, NO_ANSWER, ({"3": "RUNNING"}, 0.1)])

    async def query(command: str, logger: logging.Logger) -> tuple[object, object]:
        return next(answers)

    found = asyncio.run(patient(query, wait=0.0)("squeue", logging.getLogger("test")))
    assert found == ({"3": "RUNNING"}, 0.1)
    assert [record.message for record in caplog.records] == ["Slurm does not answer; asking again every 0 s: squeue"]


def test_no_jobs_is_an_answer() -> None:
    async def query(command: str, logger: logging.Logger) -> tuple[object, object]:
        return {}, 0.1

    assert asyncio.run(patient(query)("squeue", logging.getLogger("test"))) == ({}, 0.1)


def test_what_was_known_stays_known_while_nobody_answers() -> None:
    answers = iter([None, 300, None, 600, None])
    ask = remembered(lambda: next(answers))
    assert [ask() for _ in range(4)] == [300, 300, 600, 600]


def test_the_plugin_still_has_what_is_mended() -> None:
    plugin = pytest.importorskip("snakemake_executor_plugin_slurm", reason="`make install-slurm` installs it")
    assert inspect.iscoroutinefunction(plugin.query_job_status)
    assert list(inspect.signature(plugin.query_job_status).parameters) == ["command", "logger"]
    source = inspect.getsource(plugin.Executor.check_active_jobs)
    assert "get_min_job_age()" in source
    assert "await query_job_status(" in source
