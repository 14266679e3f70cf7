"""Floating-point operations of a step, and bytes read by decoding, from numbers alone. Torch-free.

What is counted: matrix products, a multiplication and an addition each (a product of m x k by k x n is 2 m k n); not norms,
softmax, activations or the optimizer. Two counts of the same work:

* `model`: real tokens, nothing computed twice. MFU divides it (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).
* `hardware`: what the device was given: padded positions too, and recomputation under activation checkpointing. HFU divides it
  (Korthikanti et al. 2022, arXiv:2205.05198, section 6).

Formulas, per token, for N parameters in matrix products (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; no embedding
look-up; the head once, tied or not; a scalar head is hidden x 1):

    forward 2N + A, backward 4N + 2A, so full fine-tuning 6N + 3A
    LoRA    4 Nf + 6 Nl + 6 Nt + 3A: a frozen matrix needs no gradient of its weight, only of its input; the layers that read the
            frozen embedding do not need even that, which is subtracted here
    A = 4 L d T c, attention scores and their product with the values, L layers, width d, T positions; c: `causal_share`
    generation with a KV cache, prompt P, response R: one forward over P, then R - 1 over one position each

The head counts where it is computed: SFT and the ptx loss compute it only at positions that carry loss, PPO only at the response's;
so a token of a prompt costs less than the formula's N says, and MFU is not raised by products that were never made.

T enters as the mean length of the sequences counted. For sequences of unequal length that is a lower bound of the attention
part (the mean of squares is not below the square of the mean). docs/flops.md shows what this was checked against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.cell import Cell
from bench.measure.shape import Network, Shape

WEIGHT_BYTES = {"fp32": 4, "bf16-pure": 2, "bf16-master": 2, "bf16-autocast": 4, "fp16-master": 2}
"""Bytes of a stored parameter by precision mode."""
OPTIMIZER_BYTES = {"fp32": 8, "bf16-pure": 4, "bf16-master": 12, "bf16-autocast": 8, "fp16-master": 12}
"""Bytes of AdamW's two moments, and of the fp32 master where the mode has one, of a trainable parameter."""
CACHE_BYTES = {"fp32": 4, "bf16-pure": 2, "bf16-master": 2, "bf16-autocast": 2, "fp16-master": 2}
"""Bytes of a number in the KV cache."""
PRODUCT_DTYPE = {"fp32": "fp32", "bf16-pure": "bf16", "bf16-master": "bf16", "bf16-autocast": "bf16", "fp16-master": "fp16"}
"""What matrix products multiply in a precision mode: which peak of the device applies. `tf32` where torch was told to round fp32."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one piece of work, counted two ways."""

    model: float = 0.0
    """On real tokens, nothing twice."""
    hardware: float = 0.0
    """With padding and recomputation."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)


def total(pieces: Iterable[Flops]) -> Flops:
    """Sum of some pieces of work."""
    return sum(pieces, Flops())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """How many sequences a network reads, and how long they are."""

    count: float
    length: float
    """Positions of each; the mean, if they differ."""
    head_positions: float | None = None
    """Positions of each that the head computes; null: all."""

    @property
    def positions(self) -> float:
        """Of all sequences."""
        return self.count * self.length

    @property
    def heads(self) -> float:
        """Positions of all sequences that the head computes."""
        return self.positions if self.head_positions is None else self.count * self.head_positions


def causal_share(shape: Shape, *, padded: bool) -> float:
    """The share c of the attention square that is computed: 1/2 where the kernel skips the future, else 1.

    BLOOM adds its ALiBi biases in plain products over the whole square: 1. The others call scaled_dot_product_attention: transformers
    asks it for causality without a mask if no position of the batch is padding (1/2), and hands it a whole mask otherwise (1).
    """
    return 0.5 if shape.causal_kernel and not padded else 1.0


def attention_flops(shape: Shape, work: Sequences, causal: float) -> float:
    """Scores and weighted values of one forward pass: 4 L d T^2 c for each sequence; d counts query heads (grouped-query: not fewer)."""
    return 4.0 * shape.layers * shape.attention_width * causal * work.count * work.length**2


def forward_flops(network: Network, work: Sequences, causal: float) -> float:
    """One forward pass over whole sequences."""
    layers = network.shape.layer_parameters + network.adapter_parameters
    return 2.0 * layers * work.positions + 2.0 * network.head_parameters * work.heads + attention_flops(network.shape, work, causal)


def backward_flops(network: Network, work: Sequences, causal: float) -> float:
    """The backward pass of a training step: gradients of inputs, and of the weights that train."""
    head = (4.0 if network.head_trains else 2.0) * network.head_parameters * work.heads
    attention = 2.0 * attention_flops(network.shape, work, causal)
    if network.lora_rank == 0:
        return 4.0 * network.shape.layer_parameters * work.positions + head + attention
    layers = 2.0 * network.shape.layer_parameters + 4.0 * network.adapter_parameters - 2.0 * _unneeded_gradients(network)
    return layers * work.positions + head + attention


def _unneeded_gradients(network: Network) -> int:
    """Parameters whose input is the frozen embedding's output: the first layer's query, key, value, and the A of their adapters."""
    return sum(matrix.parameters + network.lora_rank * matrix.fan_in for matrix in network.shape.entry_matrices)


def recomputed_flops(network: Network, work: Sequences, causal: float) -> float:
    """What activation checkpointing computes twice: every layer, but for its last product, whose output no gradient needs.

    torch.utils.checkpoint (non-reentrant) stops once everything saved is there again.
    """
    last = network.shape.exit_matrix
    spared = last.fan_out * network.lora_rank if network.lora_rank else last.parameters
    layers = network.shape.layer_parameters + network.adapter_parameters - network.shape.layers * spared
    return 2.0 * layers * work.positions + attention_flops(network.shape, work, causal)


def prefill_flops(network: Network, *, sequences: float, prompt: float, causal: float) -> float:
    """The forward pass over prompts of `prompt` positions, the head at the last position only."""
    return forward_flops(network, Sequences(count=sequences, length=prompt, head_positions=1), causal)


def decode_flops(network: Network, *, sequences: float, prompt: float, response: float) -> float:
    """The response - 1 forward passes over one position each; the i-th attends to prompt + i positions."""
    steps = max(response - 1.0, 0.0)
    attended = steps * prompt + steps * (steps + 1.0) / 2.0
    per_step = 2.0 * (network.shape.layer_parameters + network.adapter_parameters + network.head_parameters)
    return sequences * (per_step * steps + 4.0 * network.shape.layers * network.shape.attention_width * attended)


# -- a step of a cell --------------------------------------------------------------------------------------------


def step_flops(cell: Cell, shape: Shape, counts: Mapping[str, float]) -> dict[str, Flops]:
    """Operations by phase of the work that `counts` describes: one step (PPO: iteration), or a whole window, over all ranks.

    `counts` has the keys of `Lap.counts`: tokens, padded_tokens, sequences, and for SFT loss_tokens, the positions that the head
    computes; for PPO: prompt_tokens, response_tokens, sequences, and with a ptx loss the four of SFT, each named ptx_. KeyError if one
    is missing. Phases: forward and backward, or those of PPO's clock (the ptx loss is part of policy_learn).
    """
    if cell.stage == "ppo":
        return _ppo_flops(cell, shape, counts)
    network = Network(shape=shape, scalar_head=cell.stage == "rm", lora_rank=cell.lora_rank)
    return _training(cell, network, *_batch(network, counts, whole_head=cell.settings.pipeline_parallel > 1))


def _batch(network: Network, counts: Mapping[str, float], prefix: str = "", *, whole_head: bool = False) -> tuple[Sequences, Sequences]:
    """Sequences as their real tokens, and as they were padded; a language-model head needs only the positions that carry loss.

    `whole_head`: it computes all of the padded ones nevertheless, as the last stage of a pipeline does.
    """
    count = counts[f"{prefix}sequences"]
    per_sequence = 1.0 / max(count, 1)
    heads = None if network.scalar_head else counts[f"{prefix}loss_tokens"] * per_sequence
    real, padded = (
        Sequences(count=count, length=counts[f"{prefix}{unit}"] * per_sequence, head_positions=computed)
        for unit, computed in (("tokens", heads), ("padded_tokens", None if whole_head else heads))
    )
    return real, padded


def _training(cell: Cell, network: Network, real: Sequences, padded: Sequences) -> dict[str, Flops]:
    causal = causal_share(network.shape, padded=padded.length > real.length)
    again = recomputed_flops(network, padded, causal) if cell.settings.activation_checkpointing else 0.0
    return {
        "forward": Flops(forward_flops(network, real, causal), forward_flops(network, padded, causal)),
        "backward": Flops(backward_flops(network, real, causal), backward_flops(network, padded, causal) + again),
    }


def _ppo_flops(cell: Cell, shape: Shape, counts: Mapping[str, float]) -> dict[str, Flops]:
    """PPO: rollout, four scoring passes, and `ppo_epochs` passes of learning by policy and critic; adapters everywhere they are."""
    lengths = _Lengths.of(cell, counts)
    causal = causal_share(shape, padded=lengths.is_padded)
    policy, critic = (Network(shape=shape, scalar_head=scalar, lora_rank=cell.lora_rank) for scalar in (False, True))
    reference, reward = (Network(shape=shape, scalar_head=scalar, frozen=True) for scalar in (False, True))
    seen, seen_scalar = (lengths.read(window=window) for window in (True, False))
    learned, learned_scalar = (lengths.read(window=window, times=cell.settings.ppo_epochs) for window in (True, False))

    def forward(network: Network, work: tuple[Sequences, Sequences]) -> Flops:
        return Flops(*(forward_flops(network, one, causal) for one in work))

    def learn(network: Network, work: tuple[Sequences, Sequences]) -> Flops:
        return total(_training(cell, network, *work).values())

    phases = {
        **_rollout(policy, lengths, causal),
        "reward": forward(reward, seen_scalar),
        "reference": forward(reference, seen),
        "policy_logprob": forward(policy, seen),
        "value": forward(critic, seen_scalar),
        "policy_learn": learn(policy, learned),
        "critic_learn": learn(critic, learned_scalar),
    }
    if cell.settings.ptx_coef > 0:
        phases["policy_learn"] += learn(policy, _batch(policy, counts, "ptx_"))
    return phases


def _rollout(policy: Network, lengths: _Lengths, causal: float) -> dict[str, Flops]:
    count = lengths.sequences
    prefills = (prefill_flops(policy, sequences=count, prompt=prompt, causal=causal) for prompt, _ in lengths.both)
    decodes = (decode_flops(policy, sequences=count, prompt=prompt, response=response) for prompt, response in lengths.both)
    return {"rollout_prefill": Flops(*prefills), "rollout_decode": Flops(*decodes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lengths:
    """Mean lengths of the sequences of some iterations."""

    sequences: float
    prompt: float
    padded_prompt: float
    response: float
    padded_response: float
    """Exact for `length: fixed`. For `natural` the longest response of each batch is not counted: the mean, a lower bound."""

    @classmethod
    def of(cls, cell: Cell, counts: Mapping[str, float]) -> _Lengths:
        sequences, settings = max(counts["sequences"], 1), cell.settings
        response = counts["response_tokens"] / sequences
        return cls(
            sequences=counts["sequences"],
            prompt=counts["prompt_tokens"] / sequences,
            padded_prompt=settings.prompt_length,
            response=response,
            padded_response=settings.response_length if settings.length == "fixed" else response,
        )

    @property
    def both(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Prompt and response, real, then padded."""
        return (self.prompt, self.response), (self.padded_prompt, self.padded_response)

    @property
    def is_padded(self) -> bool:
        return self.padded_prompt > self.prompt or self.padded_response > self.response

    def read(self, *, window: bool, times: int = 1) -> tuple[Sequences, Sequences]:
        """Prompt and response together; `window`: the head computes the response's positions only."""
        real, padded = (
            Sequences(count=times * self.sequences, length=prompt + response, head_positions=response if window else None)
            for prompt, response in self.both
        )
        return real, padded


# -- bytes that decoding reads -----------------------------------------------------------------------------------


def decode_bytes(network: Network, precision: str, *, batch: float, prompt: float, response: float) -> float:
    """Bytes that one rank reads to decode one batch: in each of response - 1 steps all weights once, and the keys and values so far.

    A lower bound of the traffic: activations, what is written, and copies of the cache are left out.
    """
    steps = max(response - 1.0, 0.0)
    weights = WEIGHT_BYTES[precision] * (network.shape.layer_parameters + network.adapter_parameters + network.head_parameters)
    position = 2 * network.shape.layers * network.shape.kv_width * CACHE_BYTES[precision]
    attended = steps * prompt + steps * (steps + 1.0) / 2.0
    return steps * weights + batch * position * attended


def rollout_bytes(cell: Cell, shape: Shape, counts: Mapping[str, float]) -> float:
    """`decode_bytes` of all ranks, for the iterations that `counts` describes (PPO; a data-parallel rank decodes its share at once)."""
    lengths = _Lengths.of(cell, counts)
    policy = Network(shape=shape, lora_rank=cell.lora_rank)
    ranks, settings = cell.data_parallel_size, cell.settings
    batch = settings.prompts_per_iteration * (ranks if settings.scaling == "weak" else 1) / ranks
    one = decode_bytes(policy, settings.precision, batch=batch, prompt=lengths.padded_prompt, response=lengths.padded_response)
    return one * counts["sequences"] / batch


# -- shares of a ceiling -----------------------------------------------------------------------------------------


def mfu(model_flops: float, seconds: float, *, devices: int, peak: float) -> float:
    """Model FLOPs utilisation, a share: `Flops.model` of all devices / (seconds x devices x peak FLOP/s of one).

    With `peak` the dense peak of the device for the dtype multiplied (`devices.device_row`), it is MFU as in PaLM, appendix B.
    With the rate measured on the node (`ceilings.matrix_rate`) it is the share of what was attainable there.

    >>> mfu(3.2e15, 10.0, devices=2, peak=312e12)
    0.5128205128205128
    """
    return _share(model_flops, seconds, devices, peak)


def hfu(hardware_flops: float, seconds: float, *, devices: int, peak: float) -> float:
    """Hardware FLOPs utilisation, a share: as `mfu`, of `Flops.hardware`; never below it."""
    return _share(hardware_flops, seconds, devices, peak)


def mbu(read_bytes: float, seconds: float, *, devices: int, bandwidth: float) -> float:
    """Memory bandwidth utilisation, a share: bytes that decoding reads / (seconds x devices x peak bytes/s of one).

    For `rollout_bytes` over the seconds of the phase rollout_decode. Decoding a small batch is bound by bandwidth, not by FLOPs
    (Pope et al. 2022, arXiv:2211.05102, section 2).
    """
    return _share(read_bytes, seconds, devices, bandwidth)


def _share(amount: float, seconds: float, devices: int, ceiling: float) -> float:
    if seconds <= 0 or devices < 1 or ceiling <= 0:
        raise ValueError(f"a share needs seconds, devices and a ceiling above 0; seen: {seconds}, {devices}, {ceiling}")
    return amount / (seconds * devices * ceiling)
