"""From what was seen of one model on one rank to checks: shown, refuted or not applicable. Pure; what each means: docs/evidence.md.

Expectations follow from what a strategy's class declares (`sharded`, `offloaded`), the precision mode and the model's own numbers; no
strategy is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

from bench.measure.evidence.walk import NOTHING, Amount
from bench.measure.flops import OPTIMIZER_BYTES, WEIGHT_BYTES
from bench.record import Check, EvidenceState, Traffic

LEAST, MOST = 0.9, 1.4
"""Bytes seen over bytes expected. Chunks and padding take up to a third more on tiny models; a whole copy on two ranks is twice a share."""
SLACK = 4096
"""Bytes beside that: step counters, paddings of tiny tensors."""
MOST_WHOLE = 1.1
"""The same for frozen weights that are whole, and for the part that a rank holds where one model is split over ranks. Both are known
exactly, and a stage of a small model, with its embedding, holds up to seven eighths of it."""
UNKNOWN_PART = 0.95
"""Where it is not known how one model is split, a rank holds less of it than this share."""
LEAST_MOVED = 1e-3
"""Mean movement of the updated values over the sum of learning rates. Adam moves a value by about the learning rate a step, whatever
the gradient's size; over n steps of random signs by 1 / sqrt(n) of their sum."""
LEAST_ADAPTERS = 0.9
"""Share of the adapters' second matrices that must have changed: they begin at zero."""
NOUNS = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer state"}
REDUCING = ("all-reduce", "reduce-scatter", "reduce")
GATHERING = ("all-gather", "broadcast", "all-to-all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What the strategy's class and the cell say, before anything runs."""

    sharded: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    precision: str = "fp32"
    data_parallel: int = 1
    """Ranks that see different sequences."""
    model_parallel: int = 1
    """Ranks that hold one model between them."""
    on_gpu: bool = False

    def ways(self, what: str) -> int:
        """Over how many ranks parameters, gradients, optimizer or frozen weights lie in shares."""
        return self.data_parallel if what in self.sharded else 1

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return self.data_parallel * self.model_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of some tensors did something."""

    some: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found of one model on this rank; None where there was nothing to look at."""

    model: str
    lora_rank: int = 0
    trainable: int
    """Parameters that the optimizer shall update, counted in the bare module."""
    frozen: int
    predicted: int | None
    """Trainable parameters by arithmetic on the model's configuration."""
    part: int | None = None
    """Those of this rank and its data-parallel peers; None if the architecture's numbers are not known."""
    frozen_bytes: int | None = None
    """Bytes of weights that never train, by the same arithmetic, before data-parallel ranks share them."""
    live: int | None
    """Trainable parameters of the prepared module."""
    parameters: Amount = NOTHING
    masters_are_parameters: bool = False
    frozen_amount: Amount = NOTHING
    gradients: Amount | None = None
    optimizer: Amount = NOTHING
    collectives: dict[str, Traffic] | None = None
    micro_steps: Share | None = None
    """Weights that changed between two micro-steps of one step."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of all steps; infinite where one was not finite."""
    moved: float | None = None
    """Mean movement over the sum of the learning rates."""
    changed: Share | None = None
    """Updated tensors that changed in training."""
    adapters: Share | None = None
    """Second matrices of adapters that changed; None where they lie in chunks."""
    unmoved: Share | None = None
    """Frozen tensors that did not change."""
    agreement: Share | None = None
    """Weights that are the same on all ranks."""


def judge(seen: Seen, declared: Declared) -> list[Check]:
    """All checks of one model."""
    rules: tuple[Callable[[Seen, Declared], Iterator[Check]], ...] = (
        _trainable, _parameters, _frozen, _gradients, _optimizer, _placement, _reduced, _gathered, _exchanged, _norm, _moved, _adapters,
        _unmoved, _agreement, _micro_steps,
    )  # fmt: skip
    return [check for rule in rules for check in rule(seen, declared)]


def _check(
    seen: Seen, what: str, state: EvidenceState | bool, text: str, *, found: float | None = None, expected: float | None = None,
    unit: str = "",
) -> Check:  # fmt: skip
    verdict: EvidenceState = state if isinstance(state, str) else "shown" if state else "refuted"
    return Check(what=what, model=seen.model, state=verdict, seen=found, expected=expected, unit=unit, text=text)


# -- counts ----------------------------------------------------------------------------------------------------------


def _trainable(seen: Seen, declared: Declared) -> Iterator[Check]:
    what, expected = "trainable", seen.predicted
    if expected is None:
        yield _check(seen, what, "not applicable", "the architecture's numbers are not known here, so nothing predicts the count")
        return
    whole, part = expected, seen.part if declared.model_parallel > 1 else None
    live = seen.trainable if seen.live is None or (declared.model_parallel > 1 and part is None) else seen.live
    kind = f"LoRA of rank {seen.lora_rank}" if seen.lora_rank else "full training"
    expected = whole if part is None else part
    here = "" if part is None else f", of which this rank's part has {part:,}"
    yield _check(
        seen, what, live == expected and seen.trainable == whole, f"{live:,} parameters train; {kind} of this model has {whole:,}{here}",
        found=live, expected=expected, unit="parameters",
    )  # fmt: skip


# -- bytes -----------------------------------------------------------------------------------------------------------


def _parameters(seen: Seen, declared: Declared) -> Iterator[Check]:
    if seen.masters_are_parameters:
        yield _check(seen, "parameters", "not applicable", "the parameters are their own fp32 masters and count as optimizer state")
        return
    yield _bytes(seen, declared, "parameters", seen.parameters, WEIGHT_BYTES[declared.precision])


def _optimizer(seen: Seen, declared: Declared) -> Iterator[Check]:
    if _all_skipped(seen, declared):
        yield _check(seen, "optimizer", "not applicable", "every step overflowed fp16 and was skipped, so there are no moments yet")
        return
    yield _bytes(seen, declared, "optimizer", seen.optimizer, OPTIMIZER_BYTES[declared.precision])


def _gradients(seen: Seen, declared: Declared) -> Iterator[Check]:
    found = seen.gradients
    if found is None:
        yield _check(seen, "gradients", "not applicable", "no update was traced")
    elif not found.elements + found.host_elements:
        text = "no tensors of their own just before the update: they lie where the parameters were"
        yield _check(seen, "gradients", "not applicable", text)
    else:
        size = (found.bytes + found.host_bytes) / (found.elements + found.host_elements)
        yield _bytes(seen, declared, "gradients", found, size)


def _bytes(seen: Seen, declared: Declared, what: str, found: Amount, element_bytes: float) -> Check:
    """Bytes on this rank against the share of them that the declaration gives it."""
    ways, expected = declared.ways(what), _elements(seen, declared) * element_bytes / declared.ways(what)
    least, most, lies = LEAST * expected, MOST * expected + SLACK, "whole" if ways == 1 else f"a share of 1/{ways}"
    if declared.model_parallel > 1:
        lies, most = f"the part of a rank where {declared.model_parallel} hold one model between them", MOST_WHOLE * expected + SLACK
        if seen.part is None:  # runs of layers are not equal: embeddings, most of a small model, lie on one stage
            least, most = least / 8, UNKNOWN_PART * expected * declared.model_parallel
    size = _of_one_copy(found, least)
    text = f"{written(size)} of {NOUNS[what]} on this rank; {written(expected)}, {lies}, is declared"
    return _check(seen, what, least <= size <= most, text, found=size, expected=expected, unit="bytes")


def _elements(seen: Seen, declared: Declared) -> float:
    """Trainable parameters of this rank and its data-parallel peers."""
    if declared.model_parallel == 1:
        return seen.trainable
    return seen.trainable / declared.model_parallel if seen.part is None else seen.part


def _of_one_copy(found: Amount, least: float) -> int:
    """Bytes of what is there: Gemini keeps a pinned copy in host memory of what lies on the device, which is no second share."""
    largest = max(found.bytes, found.host_bytes)
    return largest if largest >= least else found.bytes + found.host_bytes


def _frozen(seen: Seen, declared: Declared) -> Iterator[Check]:
    if not seen.frozen:
        return
    found = seen.frozen_amount.bytes + seen.frozen_amount.host_bytes
    expected = _frozen_whole(seen, declared) / declared.ways("frozen")
    text = f"{written(found)} of frozen parameters on this rank; {written(expected)} are expected"
    most = (MOST if declared.ways("frozen") > 1 or seen.frozen_bytes is None else MOST_WHOLE) * expected + SLACK
    yield _check(seen, "frozen", found <= most, text, found=found, expected=expected, unit="bytes")


def _frozen_whole(seen: Seen, declared: Declared) -> float:
    """Bytes of weights that never train, before data-parallel ranks share them."""
    if seen.frozen_bytes is not None:
        return seen.frozen_bytes
    return seen.frozen * WEIGHT_BYTES[declared.precision]


def _placement(seen: Seen, declared: Declared) -> Iterator[Check]:
    """On a GPU: optimizer states on the device unless they are declared to lie in host memory."""
    if not declared.on_gpu:
        return
    found, offloaded = seen.optimizer, "optimizer" in declared.offloaded
    share = found.host_bytes / max(1, found.bytes + found.host_bytes)
    where = "in host memory" if offloaded else "on the device"
    text = f"{share:.0%} of the optimizer states lie in host memory; they are declared to lie {where}"
    yield _check(seen, "placement", share > 0 if offloaded else found.bytes > 0 and share <= 0.5, text, found=share, unit="share")


def written(size: float) -> str:
    """Bytes for people.

    >>> written(1449472), written(300.0)
    ('1.38 MiB', '300 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    raise AssertionError


# -- collectives -----------------------------------------------------------------------------------------------------


def _reduced(seen: Seen, declared: Declared) -> Iterator[Check]:
    """Every gradient is added up over the data-parallel ranks."""
    if declared.data_parallel == 1:
        yield _check(seen, "reduced", "not applicable", "one data-parallel rank has nobody to add gradients up with")
        return
    yield _traffic(seen, declared, "reduced", REDUCING, "gradients", _elements(seen, declared) * WEIGHT_BYTES[declared.precision])


def _gathered(seen: Seen, declared: Declared) -> Iterator[Check]:
    """What is updated in shares has to be put together again."""
    if declared.data_parallel == 1 or not declared.sharded & {"parameters", "optimizer"}:
        yield _check(seen, "gathered", "not applicable", "nothing that forward passes read is in shares")
        return
    expected = seen.trainable * WEIGHT_BYTES[declared.precision] + (_frozen_whole(seen, declared) if "frozen" in declared.sharded else 0)
    yield _traffic(seen, declared, "gathered", GATHERING, "weights in shares", expected)


def _exchanged(seen: Seen, declared: Declared) -> Iterator[Check]:
    """Ranks that hold one model between them have to talk about activations."""
    if declared.model_parallel == 1 or seen.collectives is None:
        return
    size = sum(traffic.bytes for traffic in seen.collectives.values())
    listed = ", ".join(f"{traffic.count} {kind}" for kind, traffic in seen.collectives.items()) or "nothing"
    text = f"{listed} in the traced step, {written(size)} in all, between ranks that hold one model between them"
    yield _check(seen, "exchanged", size > SLACK, text, found=size, expected=SLACK, unit="bytes")


def _traffic(seen: Seen, declared: Declared, what: str, kinds: tuple[str, ...], subject: str, expected: float) -> Check:
    if seen.collectives is None:
        return _check(seen, what, "not applicable", "no step was traced")
    found = {kind: traffic for kind, traffic in seen.collectives.items() if kind in kinds}
    size = sum(traffic.bytes for traffic in found.values())
    least = LEAST * expected * (0.5 if declared.model_parallel > 1 and seen.part is None else 1.0)
    listed = ", ".join(f"{traffic.count} {kind} of {written(traffic.bytes)}" for kind, traffic in found.items()) or "nothing"
    text = f"{listed} in the traced step; the {subject} are {written(expected)}"
    return _check(seen, what, size >= least, text, found=size, expected=expected, unit="bytes")


# -- learning --------------------------------------------------------------------------------------------------------


def _norm(seen: Seen, declared: Declared) -> Iterator[Check]:
    finite = [norm for norm in seen.norms if norm < inf]
    positive = sum(norm > 0 for norm in finite)
    if not seen.norms or _all_skipped(seen, declared):
        text = "every step overflowed fp16 and was skipped" if seen.norms else "no norm of this model's gradients was recorded"
        yield _check(seen, "gradient norm", "not applicable", text)
        return
    text = f"above 0 and finite in {positive} of {len(seen.norms)} steps"
    yield _check(seen, "gradient norm", positive > 0, text, found=positive, expected=len(seen.norms), unit="steps")


def _all_skipped(seen: Seen, declared: Declared) -> bool:
    return declared.precision == "fp16-master" and bool(seen.norms) and min(seen.norms) == inf


def _moved(seen: Seen, declared: Declared) -> Iterator[Check]:  # noqa: ARG001 (all rules take both)
    if seen.changed is None or seen.moved is None or not seen.changed.of:
        yield _check(seen, "moved", "not applicable", "no step had a learning rate and a gradient that were not 0")
        return
    text = (
        f"{seen.changed.some} of {seen.changed.of} updated tensors changed, on average by {seen.moved:.2g} of the sum of the learning "
        f"rates; {LEAST_MOVED:g} at least is expected of Adam"
    )
    good = seen.changed.some > 0 and seen.moved >= LEAST_MOVED
    yield _check(seen, "moved", good, text, found=seen.moved, expected=LEAST_MOVED, unit="share")


def _adapters(seen: Seen, declared: Declared) -> Iterator[Check]:  # noqa: ARG001
    if not seen.lora_rank or seen.moved is None:
        return
    if seen.adapters is None or not seen.adapters.of:
        yield _check(seen, "adapters", "not applicable", "the adapters lie in chunks without names; `moved` speaks for them")
        return
    text = f"{seen.adapters.some} of {seen.adapters.of} adapters are no longer zero"
    good = seen.adapters.some >= LEAST_ADAPTERS * seen.adapters.of
    yield _check(seen, "adapters", good, text, found=seen.adapters.some, expected=seen.adapters.of, unit="tensors")


def _unmoved(seen: Seen, declared: Declared) -> Iterator[Check]:  # noqa: ARG001
    if seen.unmoved is not None and seen.unmoved.of:
        yield _all(seen, "unmoved", seen.unmoved, "frozen tensors have the bits that they had before training")


def _agreement(seen: Seen, declared: Declared) -> Iterator[Check]:  # noqa: ARG001
    if seen.agreement is not None and seen.agreement.of:
        yield _all(seen, "agreement", seen.agreement, "weights have the same bits on all ranks after training")


def _micro_steps(seen: Seen, declared: Declared) -> Iterator[Check]:  # noqa: ARG001
    if seen.micro_steps is not None and seen.micro_steps.of:
        same = Share(some=seen.micro_steps.of - seen.micro_steps.some, of=seen.micro_steps.of)
        yield _all(seen, "micro-steps", same, "weights were the same in the first two micro-steps of the traced step")


def _all(seen: Seen, what: str, share: Share, text: str) -> Check:
    return _check(
        seen, what, share.some == share.of, f"{share.some} of {share.of} {text}", found=share.some, expected=share.of, unit="tensors"
    )  # fmt: skip
