"""Whether what one report compares ran under the same conditions and on the same machines. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from bench.measure.conditions import ABSENT, VERSIONS, Difference, conditions, differences
from bench.report.registry import Trial


def other_conditions(mine: Sequence[Trial], theirs: Sequence[Trial]) -> list[Difference]:
    """The conditions that trials with the same number do not share, theirs first, each once.

    Trials with other numbers may have run under others: what is compared is paired. A package that one side did without is none of them,
    as its strategy needs none; nor is the precision in force, which a strategy may force and a flag tells.
    """
    found = (differences([conditions(other.record)], [conditions(trial.record)]) for trial, other in paired(mine, theirs))
    return [item for item in dict.fromkeys(chain.from_iterable(found)) if item.name != "precision" and not _did_without(item)]


def _did_without(item: Difference) -> bool:
    """Whether it is a package that one side had not."""
    return item.name in VERSIONS and ABSENT in (item.before, item.now)


def on_other_machines(mine: Sequence[Trial], theirs: Sequence[Trial]) -> bool:
    """Whether trials with the same number share no start of any machine, as far as it is known."""
    machines = ((_boots(trial), _boots(other)) for trial, other in paired(mine, theirs))
    return any(here and there and not here & there for here, there in machines)


def paired(mine: Sequence[Trial], theirs: Sequence[Trial]) -> Iterator[tuple[Trial, Trial]]:
    """The trials that have the same number."""
    numbered = {trial.record.trial: trial for trial in theirs}
    yield from ((trial, numbered[trial.record.trial]) for trial in mine if trial.record.trial in numbered)


def _boots(trial: Trial) -> set[str]:
    return {boot for machine in trial.record.provenance.get("machines") or [] if (boot := machine.get("boot_id"))}
