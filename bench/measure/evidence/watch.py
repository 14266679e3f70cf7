"""Gathers a rank's evidence: stands beside a strategy while it prepares models, traces a step, compares before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.cell import Cell
from bench.measure.evidence.holdings import PARTITION, Engine, Holdings
from bench.measure.evidence.judge import Declared, Seen, Share, judge
from bench.measure.evidence.trace import ModelTrace, tracing
from bench.measure.evidence.walk import digests, local, samples
from bench.measure.shape import Network, Shape, shape_of, shape_of_config
from bench.record import Check, Evidence

ADAPTER = "lora_B"
"""Part of the name of an adapter's second matrix (peft), which begins at zero."""
LARGEST = float(torch.finfo(torch.float32).max)
"""What the series say where a value was not finite."""

Networks = Callable[[Shape], Mapping[str, Network]]
"""The models of the cell's stage by role, given a shape."""


class HeldHere(Protocol):
    """What this rank and its data-parallel peers hold of a model (`bench.needs.Held`)."""

    @property
    def trainable(self) -> int:
        """Parameters that train."""

    @property
    def frozen_bytes(self) -> int:
        """Bytes of those that do not."""


HeldBy = Callable[[Network], HeldHere]


@dataclass(slots=True, kw_only=True)
class Model:
    """One model that trains, from the moment when it was prepared."""

    role: str
    network: Network | None
    trainable: int
    frozen: int
    engine: Engine
    holdings: Holdings
    trace: ModelTrace
    bits: dict[str, int] = field(default_factory=dict)
    """Of frozen parameters, adapters and updated values, before training."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Samples of the updated values, before training."""
    learned: dict[str, Any] = field(default_factory=dict)
    """What comparing before and after gave: fields of `Seen`."""


@dataclass(slots=True, kw_only=True)
class Frozen:
    """One model that is only read."""

    role: str
    module: nn.Module
    bits: list[int] = field(default_factory=list)
    unmoved: Share | None = None

    def read(self) -> list[int]:
        """Digests of what this rank holds; of a parameter in DeepSpeed's partitions this rank's, whether it is gathered just now or not."""
        return digests(local(vars(parameter).get(PARTITION, parameter)) for parameter in self.module.parameters())


class Beside:
    """A strategy, with somebody looking on while it prepares models; all else is the strategy's own."""

    def __init__(self, strategy: Any, watch: EvidenceWatch) -> None:
        self._strategy, self._watch = strategy, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Any:
        """See `bench.strategies.base.Strategy.prepare`."""
        config = getattr(module, "config", None)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
        engine = self._strategy.prepare(module, cell, device, learning_rate=learning_rate)
        self._watch.take(engine, config, sizes)
        return engine

    def place_frozen(self, module: nn.Module, cell: Cell, device: torch.device) -> nn.Module:
        """See `bench.strategies.base.Strategy.place_frozen`."""
        placed: nn.Module = self._strategy.place_frozen(module, cell, device)
        self._watch.take_frozen(placed)
        return placed


class EvidenceWatch:
    """Evidence of one rank. Call in this order: `beside`, `begin`, `tracing` around one step, `end`, `conclude`."""

    def __init__(self, cell: Cell, declared: Declared, networks: Networks, held: HeldBy, device: torch.device) -> None:
        self._cell, self._declared, self._networks, self._held, self._device = cell, declared, networks, held, device
        self._models: list[Model] = []
        self._frozen: list[Frozen] = []
        self.traced = ""

    def beside(self, strategy: Any) -> Any:
        """`strategy`, such that every model that it prepares is noted here."""
        return Beside(strategy, self)

    def lacks_step(self) -> bool:
        """Whether some rank has a model of which no step was traced. Collective, so that all ranks run one more or none does."""
        lacking = torch.tensor(sum(not model.trace.done for model in self._models), device=self._device)
        dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
        return bool(lacking)

    def take(self, engine: Engine, config: Any, sizes: Sequence[tuple[int, bool]]) -> None:
        """Note a model that has just been prepared; `sizes` are those of its parameters before that, and whether they train."""
        role, network = self._role(config, frozen=False)
        holdings = Holdings(engine, self._declared.precision, self._device)
        counts = [sum(size for size, trains in sizes if trains == wanted) for wanted in (True, False)]
        trace = ModelTrace(engine, holdings)
        self._models.append(
            Model(role=role, network=network, trainable=counts[0], frozen=counts[1], engine=engine, holdings=holdings, trace=trace)
        )

    def take_frozen(self, module: nn.Module) -> None:
        """Note a model that is only read."""
        role, _ = self._role(getattr(module, "config", None), frozen=True)
        self._frozen.append(Frozen(role=role, module=module))

    def _role(self, config: Any, *, frozen: bool) -> tuple[str, Network | None]:
        """The next role of the stage that trains, or that does not; and what the model's configuration says of it."""
        shape = shape_of(self._cell.model) if config is None else shape_of_config(config.to_dict())
        roles = [(role, network) for role, network in (self._networks(shape) if shape else {}).items() if network.frozen == frozen]
        number = len(self._frozen if frozen else self._models)
        return roles[number] if number < len(roles) else (f"{'frozen ' if frozen else ''}model {number + 1}", None)

    def begin(self) -> None:
        """Note what there is before training."""
        for model in self._models:
            model.bits = _bits(model)
            model.values = dict(zip(model.holdings.updated(), samples(model.holdings.updated().values()), strict=True))
        for frozen in self._frozen:
            frozen.bits = frozen.read()

    @contextmanager
    def tracing(self, where: str) -> Iterator[None]:
        """Trace the first step of each model inside; `where` says which that is."""
        with tracing([model.trace for model in self._models if not model.trace.done]):
            yield
        self.traced = where if self._models else ""

    def end(self, rates: Mapping[str, float]) -> None:
        """Compare with what there was before training. Collective.

        `rates` are sums of the learning rates since `begin`, by role (of steps that were not skipped).
        """
        for model in self._models:
            model.learned = {**self._compare(model, rates.get(model.role, 0.0)), "agreement": self._agreement(model)}
        for frozen in self._frozen:
            pairs = list(zip(frozen.bits, frozen.read(), strict=True))
            frozen.unmoved = Share(some=sum(before == after for before, after in pairs), of=len(pairs))

    def _compare(self, model: Model, rate: float) -> dict[str, Any]:
        before, after = model.bits, _bits(model)
        names = {kind: [name for name in after if name[0] == kind and name in before] for kind in ("frozen", "adapter", "updated")}
        differ = {kind: Share(some=sum(after[name] != before[name] for name in found), of=len(found)) for kind, found in names.items()}
        unmoved = Share(some=differ["frozen"].of - differ["frozen"].some, of=differ["frozen"].of)
        moved = _movement(model.values, model.holdings.updated()) / rate if rate > 0 else None
        return {"unmoved": unmoved, "adapters": differ["adapter"], "changed": differ["updated"], "moved": moved}

    def _agreement(self, model: Model) -> Share | None:
        """Of weights that every rank holds whole: how many are the same everywhere."""
        if self._declared.data_parallel != dist.get_world_size() or self._declared.ways("parameters") > 1 or dist.get_world_size() == 1:
            return None
        mine = torch.tensor(digests(model.holdings.weights().values()), dtype=torch.int64, device=self._device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        same = (torch.stack(everyone) == mine).all(dim=0)
        return Share(some=int(same.sum()), of=same.numel())

    def conclude(self, series: Mapping[str, Sequence[float]]) -> Evidence | None:
        """All checks; None where no model was prepared."""
        if not self._models:
            return None
        checks = [check for model in self._models for check in judge(self._seen(model, series), self._declared)]
        return Evidence(
            checks=checks + [check for frozen in self._frozen if (check := _untouched(frozen))],
            collectives={model.role: model.trace.collectives for model in self._models if model.trace.done},
            traced=self.traced,
        )

    def _seen(self, model: Model, series: Mapping[str, Sequence[float]]) -> Seen:
        holdings, trace, network = model.holdings, model.trace, model.network
        norms = series.get(series_of("gradient_norm", model.role), [])
        held = None if network is None else self._held(network)
        return Seen(
            model=model.role, lora_rank=self._cell.lora_rank, trainable=model.trainable, frozen=model.frozen,
            predicted=None if network is None else network.trainable, live=holdings.count_trainable(),
            part=None if held is None else held.trainable, frozen_bytes=None if held is None else held.frozen_bytes,
            parameters=holdings.parameters(), masters_are_parameters=holdings.masters_are_parameters,
            frozen_amount=holdings.frozen(), gradients=trace.gradients, optimizer=holdings.optimizer(),
            collectives=trace.collectives if trace.done else None,
            micro_steps=None if trace.micro_steps is None else Share(some=trace.micro_steps[0], of=trace.micro_steps[1]),
            norms=[inf if norm >= LARGEST else norm for norm in norms], **model.learned,
        )  # fmt: skip


def series_of(name: str, role: str) -> str:
    """The series of a model: those of a critic have its name in front.

    >>> series_of("gradient_norm", "policy"), series_of("gradient_norm", "critic")
    ('gradient_norm', 'critic_gradient_norm')
    """
    return f"critic_{name}" if role == "critic" else name


def learning_rates(series: Mapping[str, Sequence[float]], first: int) -> dict[str, float]:
    """Sum of the learning rates from step `first` on, by role, of steps whose gradient norm was finite and not 0."""
    found = {}
    for role in ("policy", "reward", "critic", "model 1"):
        rates, norms = (series.get(series_of(name, role), [])[first:] for name in ("learning_rate", "gradient_norm"))
        found[role] = sum(rate for rate, norm in zip(rates, norms, strict=False) if 0 < norm < LARGEST)
    return found


def _bits(model: Model) -> dict[str, int]:
    holdings = model.holdings
    tensors: dict[Any, Tensor] = {("updated", name): tensor for name, tensor in holdings.updated().items()}
    tensors |= {("frozen", name): tensor for name, tensor in holdings.frozen_weights().items()}
    tensors |= {("adapter", name): tensor for name, tensor in holdings.weights().items() if ADAPTER in name}
    return dict(zip(tensors, digests(tensors.values()), strict=True))


def _movement(before: Mapping[str, Tensor], updated: Mapping[str, Tensor]) -> float:
    """Mean over tensors of the mean distance of the sampled values."""
    now = dict(zip(updated, samples(updated.values()), strict=True))
    pairs = [(before[name], now[name]) for name in now if name in before and before[name].shape == now[name].shape and now[name].numel()]
    return sum(float((new - old).abs().mean()) for old, new in pairs) / max(1, len(pairs))


def _untouched(frozen: Frozen) -> Check | None:
    share = frozen.unmoved
    if share is None or not share.of:
        return None
    return Check(
        what="unmoved", model=frozen.role, state="shown" if share.some == share.of else "refuted", seen=share.some, expected=share.of,
        unit="tensors", text=f"{share.some} of {share.of} tensors of a model that is only read have the bits that they had before training",
    )  # fmt: skip
