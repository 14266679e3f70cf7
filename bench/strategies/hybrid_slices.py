"""What a rank holds of a model under ColossalAI's HybridParallelPlugin, from the model's numbers alone. Torch-free.

Facts of ColossalAI 0.5.0 (shardformer/policies, shardformer/layer/embedding.py, pipeline/stage_manager.py)
* Tensor parallel: matrices, the biases of those that widen (query, key, value, feed-forward entry), the embedding and an untied head
  are cut into equal slices. Norms, the biases of matrices that write a layer's output, learned positions and a scalar head stay whole.
* The vocabulary is padded to a multiple of 64 for each slice; without slices only where the embedding is the head, too.
* Pipeline: layers in equal runs, what is left over goes to the stages in the middle. The first stage has the embeddings, the last one the
  last norm and the head; a head that is the embedding lies on both.
* One forward, one backward: stage s of p keeps the activations of p - s micro-batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bench.strategies.slices import Slice, whole

if TYPE_CHECKING:
    from bench.cell import Cell
    from bench.measure.shape import Network, Shape

DIVISIBLE = 64
"""`make_vocab_size_divisible_by`, ColossalAI's default."""


class _Vectors(NamedTuple):
    """What a layer has beside its matrices."""

    norm: int
    """Vectors of the hidden width in one norm: a scale, and a shift in some."""
    entry_biases: bool = False
    other_biases: bool = False


_WITH_BIASES = _Vectors(norm=2, entry_biases=True, other_biases=True)
VECTORS = {
    "bloom": _WITH_BIASES, "gpt2": _WITH_BIASES, "opt": _WITH_BIASES,
    "llama": _Vectors(norm=1), "mistral": _Vectors(norm=1), "qwen2": _Vectors(norm=1, entry_biases=True),
}  # fmt: skip
"""By transformers' name of the architecture."""


class _Parts(NamedTuple):
    """Parameters of a model by where they lie."""

    layer: int
    """Of one layer, on one rank."""
    adapters: int
    """Of one layer."""
    embedding: int
    first: int
    """Beside the embedding on the first stage: learned positions, BLOOM's norm of the embeddings."""
    norm: int
    """Behind the last layer."""
    head: int
    """Of an untied language-model head, or of a scalar one."""


def hybrid_slices(network: Network, cell: Cell) -> tuple[Slice, ...]:
    """What a rank holds of `network`, one slice for each pipeline stage; what never trains is whole on every rank."""
    if network.frozen:
        return (whole(network),)
    stages, parts = cell.settings.pipeline_parallel, _parts(network, cell.settings.tensor_parallel)
    return tuple(_slice(network, cell, parts, stage, layers) for stage, layers in enumerate(run_lengths(network.shape.layers, stages)))


def run_lengths(layers: int, stages: int) -> list[int]:
    """Layers of each stage.

    >>> run_lengths(24, 4), run_lengths(7, 4), run_lengths(3, 2)
    ([6, 6, 6, 6], [1, 2, 2, 2], [1, 2])
    """
    each, left = divmod(layers, stages)
    start = stages // 2 - left // 2
    return [each + (start <= stage < start + left) for stage in range(stages)]


def _slice(network: Network, cell: Cell, parts: _Parts, stage: int, layers: int) -> Slice:
    first, last = stage == 0, stage == cell.settings.pipeline_parallel - 1
    base = layers * parts.layer + first * (parts.embedding + parts.first) + last * (parts.norm + parts.head)
    if last and not first and network.shape.tied and not network.scalar_head:
        base += parts.embedding
    scalar = parts.head if last and network.scalar_head else 0
    trainable = layers * parts.adapters + scalar if network.lora_rank else base
    return Slice(
        trainable=trainable, frozen=base - scalar if network.lora_rank else 0, layers=layers, ways=cell.settings.tensor_parallel,
        in_flight=min(cell.settings.pipeline_parallel - stage, cell.accumulation), last=last,
    )  # fmt: skip


def _parts(network: Network, ways: int) -> _Parts:
    shape, vectors = network.shape, VECTORS[network.shape.model_type]
    whole_layer, layer = (_layer(shape, vectors, number) for number in (1, ways))
    tied = shape.tied and not network.scalar_head
    norm = vectors.norm * shape.hidden
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return _Parts(
        layer=layer, adapters=network.adapter_parameters // shape.layers,
        embedding=_rows(shape.vocabulary, ways, padded=tied or ways > 1) * shape.hidden,
        first=shape.parameters - shape.layers * whole_layer - embeddings - norm, norm=norm,
        head=shape.hidden if network.scalar_head else 0 if tied else _rows(shape.vocabulary, ways, padded=True) * shape.hidden,
    )  # fmt: skip


def _layer(shape: Shape, vectors: _Vectors, ways: int) -> int:
    """Parameters of one layer on one of `ways` ranks."""
    matrices = sum(matrix.parameters for matrix in shape.matrices) // ways
    entry = sum(matrix.fan_out for matrix in shape.entry_matrices) if vectors.entry_biases else 0
    widening, written = (shape.inner, 2 * shape.hidden) if vectors.other_biases else (0, 0)
    return matrices + (entry + widening) // ways + written + 2 * vectors.norm * shape.hidden


def _rows(vocabulary: int, ways: int, *, padded: bool) -> int:
    """Rows of the embedding on one rank."""
    multiple = DIVISIBLE * ways if padded else 1
    return -(-vocabulary // multiple) * multiple // ways
