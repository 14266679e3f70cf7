"""Snakemake, whose plugin for Slurm asks again for as long as the scheduler does not answer. Torch-free.

    python -m bench.launch.patient_slurm ARGUMENTS OF SNAKEMAKE

The plugin by itself (seen in 2.8) takes a controller that is restarted for one that soon forgets ended jobs and asks sacct instead, which
refuses where there is no accounting; after five such answers it drops its jobs, and Snakemake waits for ever.
(https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/207)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

ASK_AGAIN_SECONDS = 5.0
NO_ANSWER = (None, None)
"""What the plugin's query returns then."""

Query = Callable[[str, Any], Awaitable[tuple[Any, Any]]]


def remembered(ask: Callable[[], int | None]) -> Callable[[], int | None]:
    """`ask`, but what it answered once is its answer while it has none."""
    known = ask()

    def answer() -> int | None:
        nonlocal known
        known = now if (now := ask()) is not None else known
        return known

    return answer


def patient(query: Query, wait: float = ASK_AGAIN_SECONDS) -> Query:
    """`query`, but it returns only with an answer; the first silence is told to the logger."""

    async def ask(command: str, logger: Any) -> tuple[Any, Any]:
        told = False
        while (found := await query(command, logger)) == NO_ANSWER:
            if not told:
                logger.warning(f"Slurm does not answer; asking again every {wait:g} s: {command}")
            told = True
            await asyncio.sleep(wait)
        return found

    return ask


def main() -> None:
    """Mend the plugin and run Snakemake."""
    import snakemake_executor_plugin_slurm as plugin
    from snakemake.cli import main as snakemake

    plugin.get_min_job_age = remembered(plugin.get_min_job_age)
    plugin.query_job_status = patient(plugin.query_job_status)
    sys.argv[0] = "snakemake"
    snakemake()


if __name__ == "__main__":
    main()
