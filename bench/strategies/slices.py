"""What one rank holds of a model before data-parallel ranks share it: the words in which strategies say how they split one. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.measure.shape import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One rank's part of a model, and its part of a forward pass."""

    trainable: int
    """Parameters that the optimizer updates here."""
    frozen: int
    """Parameters that never train."""
    layers: int
    ways: int = 1
    """Ranks over which attention heads and feed-forward widths are cut."""
    in_flight: int = 1
    """Micro-batches whose activations are kept at the same time."""
    last: bool = True
    """Whether the head and the loss are here."""


def whole(network: Network) -> Slice:
    """All of `network`."""
    return Slice(trainable=network.trainable, frozen=network.parameters - network.trainable, layers=network.shape.layers)
