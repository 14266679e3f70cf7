"""A cell, one point of the matrix, and the settings that are held fixed around it.

Torch-free. A `Cell` is a value: equal cells have equal ids. `cell_id` is for people and paths and is never parsed;
`fingerprint` also covers the data and the weights that a trial really started from, so a record is reused only when
all of them are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

SCHEMA_MAJOR = 1

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, ser_json_inf_nan="strings")

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
LIMITS = {"lora_rank": (0, 65_536), "nodes": (1, 10_000), "processes_per_node": (1, 1_024)}
"""Least and largest value on the axes that are numbers."""
LoraRank = Annotated[int, Field(ge=LIMITS["lora_rank"][0], le=LIMITS["lora_rank"][1])]
Nodes = Annotated[int, Field(ge=LIMITS["nodes"][0], le=LIMITS["nodes"][1])]
Processes = Annotated[int, Field(ge=LIMITS["processes_per_node"][0], le=LIMITS["processes_per_node"][1])]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=False)]
Name = Annotated[str, Field(min_length=1)]

Precision = Literal["fp32", "bf16-pure", "bf16-master", "bf16-autocast", "fp16-master"]

COATI_SWITCHES: dict[str, tuple[str, ...]] = {
    "sft": ("lora-alpha-1", "loss-mean-per-micro-batch"),
    "rm": ("lora-alpha-1", "loss-mean-per-micro-batch", "rm-mean-over-padded-positions"),
    "ppo": ("lora-alpha-1", "loss-mean-per-micro-batch", "rm-mean-over-padded-positions", "ppo-sequence-reward-without-gae"),
}
"""What `semantics: coati-0.2.8` switches on, by stage; sources in docs/implementation-details.md."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Overlay:
    """Packages of which a user's own checkout is used."""

    colossalai: Name
    """A checkout of ColossalAI, or its folder colossalai/; a relative path is meant from the suite's folder."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings that every stage has."""

    data: Name
    """Training data: a name of the source table, a synthetic set, or `file:PATH`."""
    rows: Count | None = None
    """Use only the first rows of the data, the held-out ones included; null uses all."""
    held_out_rows: Count = 64
    """Rows that are drawn (seeded) and kept out of training for the held-out metrics."""
    weights: Name = "random"
    """`random` (seeded, no download), `pretrained` (the preset's pinned revision) or a folder."""
    tokenizer_data: tuple[Name, ...] = ()
    """Data that a tokenizer is trained on when the weights are random; filled in at planning: all data of the suite."""
    tokenizer_vocabulary: Annotated[int, Field(ge=300, le=100_000_000)] = 8192
    """Largest size of that tokenizer; the model keeps the vocabulary of its preset, which limits the default where it is smaller."""
    precision: Precision = "bf16-master"
    """How numbers are stored; rankings stay within one mode. Explained in docs/metrics.md."""
    micro_batch: Count = 1
    """Sequences (RM: pairs) of one forward pass on one rank."""
    global_batch: Count = 8
    """Sequences (RM: pairs) of one step over all ranks and micro-steps."""
    scaling: Literal["strong", "weak"] = "strong"
    """`strong` keeps the global batch as ranks are added; `weak` multiplies it by their number."""
    sequence_length: Annotated[int, Field(ge=8, le=1_000_000_000)] = 512
    """Longest sequence in tokens; longer ones are cut at the end."""
    optimizer: Literal["adamw", "foreach", "fused", "hybrid"] = "adamw"
    """AdamW: torch's plain one, tensor by tensor; its `foreach`, all tensors at once; its fused one; or ColossalAI's HybridAdam. A suite
    that names none gets what torch itself takes: `foreach` on cuda. A strategy may force another; the record says so."""
    learning_rate: NotNegative = 1e-5
    """Peak learning rate."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""
    beta1: Share = 0.9
    """AdamW's decay of the first moment."""
    beta2: Share = 0.999
    """AdamW's decay of the second moment."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate over the steps, after the warm-up."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises linearly from 0 (rounded up to whole steps)."""
    clip_norm: Positive | None = 1.0
    """Largest gradient norm; null does not clip."""
    lora_alpha: Positive | None = None
    """LoRA alpha; null is 2 x rank. The scaling is alpha / rank."""
    base_weights: Literal["stored", "int8", "nf4"] = "stored"
    """Linear layers under LoRA: as the precision mode stores them, or in 8 (LLM.int8) or 4 bits (NF4), by bitsandbytes."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    tensor_parallel: Count = 1
    """Ranks that split every layer between them (strategy hybrid); they see the same sequences."""
    pipeline_parallel: Count = 1
    """Groups of ranks with a run of layers each (strategy hybrid); they see the same sequences."""
    semantics: Literal["standard", "coati-0.2.8"] = "standard"
    """`coati-0.2.8` restores the behaviours of that release that change numbers; each is named in the record."""
    warm_start: Literal["shared", "chain", "none"] = "shared"
    """Where RM and PPO begin: `shared`, one naive run per model, data and seed; `chain`, the same cell's earlier stage;
    `none`, the weights as they are."""
    lap_steps: Count = 5
    """Steps (PPO: iterations) between two readings of the clock."""
    save_every: Count | None = None
    """Save the training state every so many steps (PPO: iterations), at the next lap's edge, so that a trial that was stopped goes on
    from there; null saves none. The times of a trial that went on are never ranked."""
    base_seed: Annotated[int, Field(ge=0, lt=2**62)] = 42
    """Trial k uses seed base_seed + k."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where the ranks compute."""
    launcher: Literal["torchrun", "fork"] = "torchrun"
    """How ranks are started: `torchrun` (measured) or `fork` (CPU only, no timing claims)."""
    container: Name = "none"
    """Where ranks run: `none` (this environment), an image of containers/images.toml by name, or an image's file (.sqfs)."""
    overlay: Overlay | None = None
    """A checkout in the place of the installed package, as `{colossalai: PATH}`; the record has its hash, and reports call the row
    modified."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class SftSettings(Settings):
    """Supervised fine-tuning."""

    data: Name = "synthetic-instruct"
    steps: Count | None = None
    """Steps to run; exactly one of `steps` and `epochs` is given."""
    epochs: Count | None = None
    """Passes over the training rows; leftover rows that fill no global batch are dropped."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class RmSettings(Settings):
    """Reward model."""

    data: Name = "synthetic-pairs"
    steps: Count | None = None
    """Steps to run; exactly one of `steps` and `epochs` is given."""
    epochs: Count | None = None
    """Passes over the training pairs."""
    loss: Literal["log_sig", "log_exp"] = "log_sig"
    """-log sigmoid(margin), or log(1 + exp(-margin)): the same function, kept apart as the seed has both."""
    shuffle_labels: bool = False
    """Control: swap chosen and rejected at random, so that there is nothing to learn."""


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class PpoSettings(Settings):
    """Proximal policy optimisation. `global_batch` is the sequences of one learn step."""

    data: Name = "synthetic-prompts"
    lap_steps: Count = 1
    """Iterations between two readings of the clock."""
    iterations: Count = 4
    """Iterations: one rollout and its learning."""
    prompts_per_iteration: Count = 32
    """Prompts of one rollout over all ranks."""
    prompt_length: Count = 64
    """Prompt positions P; longer prompts keep their end, shorter ones are padded on the left and masked."""
    response_length: Count = 64
    """Response tokens R: exactly that many (`fixed`) or at most (`natural`)."""
    length: Literal["fixed", "natural"] = "fixed"
    """`fixed` suppresses EOS (compares systems); `natural` obeys it."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among the k likeliest tokens; 0 samples among all."""
    ppo_epochs: Count = 1
    """Passes over one iteration's experience."""
    kl_coef: NotNegative = 0.05
    """Weight of the per-token KL penalty against the reference policy."""
    gamma: Share = 1.0
    """Discount."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    policy_clip: Positive = 0.2
    """Clip of the probability ratio."""
    value_clip: Positive | None = 0.2
    """Clip of the value's change; null does not clip."""
    reward_clip: Positive | None = 5.0
    """Largest absolute reward; null does not clip."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the iteration."""
    critic_learning_rate: NotNegative | None = None
    """Learning rate of the critic; null is that of the policy."""
    ptx: Name = "none"
    """Data of the language-model loss that is mixed into the policy's (instruction rows), or `none`."""
    ptx_coef: Share = 0.0
    """Policy loss = (1 - ptx_coef) x PPO + ptx_coef x ptx."""
    frozen_placement: Literal["device", "host"] = "device"
    """Where reference policy and reward model lie: on the `device`, or in `host` memory, from where each layer visits the device while it
    computes (slow, and room for models larger than the device has left)."""
    frozen_weights: Literal["stored", "int8"] = "stored"
    """Linear layers of reference policy and reward model: as the precision mode stores them, or in 8 bits (LLM.int8, bitsandbytes)."""
    reward_model: Name = "trained"
    """`trained` (the RM stage's), `fresh-head` (untrained: timing only), or a checkpoint folder."""


SETTINGS: dict[str, type[Settings]] = {"sft": SftSettings, "rm": RmSettings, "ppo": PpoSettings}


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of the matrix with its settings.

    >>> cell = cell_from_json({"stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "lora_rank": 8, "nodes": 2,
    ...                        "processes_per_node": 1, "steps": 30, "global_batch": 8, "micro_batch": 2})
    >>> cell.world_size, cell.accumulation, cell.cell_id[:33]
    (2, 2, 'sft-bloom-tiny-ddp-lora8-2x1-35f6')
    """

    stage: Name
    model: Name
    """A preset, a local folder or a hub id."""
    strategy: Name
    lora_rank: LoraRank = 0
    """0 trains all parameters."""
    nodes: Nodes = 1
    processes_per_node: Processes = 1
    settings: Any = None
    """The settings class of the stage."""

    @property
    def world_size(self) -> int:
        """Ranks of the cell."""
        return self.nodes * self.processes_per_node

    @property
    def model_parallel_size(self) -> int:
        """Consecutive ranks that hold one model between them and see the same sequences (tensor x pipeline parallel)."""
        return self.settings.tensor_parallel * self.settings.pipeline_parallel

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that see different sequences; planning has made sure that it is whole and not 0."""
        return max(1, self.world_size // self.model_parallel_size)

    @property
    def step_batch(self) -> int:
        """Sequences of one step over all ranks, after scaling."""
        return self.settings.global_batch * (self.data_parallel_size if self.settings.scaling == "weak" else 1)

    @property
    def accumulation(self) -> int:
        """Micro-steps of one step; planning has made sure that it is whole."""
        return self.step_batch // (self.settings.micro_batch * self.data_parallel_size)

    @property
    def lora_alpha(self) -> float:
        """LoRA alpha in force (1 under the old semantics, where the scaling thus was 1 / rank)."""
        if self.settings.semantics == "coati-0.2.8":
            return 1.0
        return self.settings.lora_alpha or 2.0 * self.lora_rank

    @property
    def semantics_switches(self) -> tuple[str, ...]:
        """The old behaviours that are switched on, by name."""
        return COATI_SWITCHES[self.stage] if self.settings.semantics == "coati-0.2.8" else ()

    @property
    def cell_id(self) -> str:
        """Readable slug and 8 hex digits of everything that planning knows of the cell."""
        model = re.sub(r"[^a-z0-9.]+", "-", self.model.lower()).strip("-")[-40:]
        shape = f"{self.nodes}x{self.processes_per_node}"
        return f"{self.stage}-{model}-{self.strategy}-lora{self.lora_rank}-{shape}-{digest(identity(self))[:8]}"


def cell_to_json(cell: Cell) -> dict[str, Any]:
    """The flat form that stands in cell files and records: axes, then settings."""
    axes = {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell) if field.name != "settings"}
    settings = {field.name: getattr(cell.settings, field.name) for field in dataclasses.fields(cell.settings)}
    return {key: _plain(value) for key, value in {**axes, **settings}.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Overlay):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def identity(cell: Cell) -> dict[str, Any]:
    """What tells this cell from others: its flat form without the values that are at their defaults.

    So a setting that is added later leaves the identity of older cells alone; a default never changes within one
    schema major (a golden test holds them).
    """
    defaults = {field.name: field.default for kind in (type(cell), type(cell.settings)) for field in dataclasses.fields(kind)}
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    return {key: value for key, value in cell_to_json(cell).items() if key not in defaults or defaults[key] != value}


AXES = tuple(field.name for field in dataclasses.fields(Cell) if field.name != "settings")


def cell_from_json(content: dict[str, Any]) -> Cell:
    """Inverse of `cell_to_json`. Raises pydantic's ValidationError, or KeyError for an unknown stage."""
    axes = {key: content[key] for key in AXES if key in content}
    rest = {key: value for key, value in content.items() if key not in AXES}
    return Cell(**axes, settings=validate_settings(content["stage"], rest))


_adapters = {stage: TypeAdapter(kind) for stage, kind in SETTINGS.items()}


def validate_settings(stage: str, content: dict[str, Any]) -> Settings:
    """Return the settings of `stage` that `content` gives, else pydantic's ValidationError; KeyError for an unknown stage."""
    return _adapters[stage].validate_json(json.dumps(content, default=str))


def canonical_json(content: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(content: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def fingerprint(cell: Cell, data_sha256: dict[str, str], start_sha256: dict[str, str]) -> str:
    """Identity of what a trial computes: cell, settings, data, starting weights, schema major; no path, host or comment.

    `data_sha256` maps data names, `start_sha256` roles (`tokenizer`, `policy`, `reward`, `container`, `overlay:...`) to
    hashes. Data counts by content:
    the same rows under another name or path are the same data.
    """
    by_content = {"data": data_sha256.get(cell.settings.data), "ptx": data_sha256.get(getattr(cell.settings, "ptx", "none"))}
    named = {key: value for key, value in identity(cell).items() if key not in ("data", "ptx", "tokenizer_data", "overlay")}
    return digest({"schema": SCHEMA_MAJOR, "cell": named, "data": by_content, "starts": start_sha256})
