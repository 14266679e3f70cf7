"""Weights that never train in 8 or 4 bits: what lies how, how near outputs and losses stay, PPO's frozen models, the base under LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.measure.evidence.walk import local, storages, walk
from bench.models.build import build_policy, build_scorer
from bench.needs import needs
from bench.strategies.base import all_strategies
from bench.strategies.precision import frozen_copy
from bench.strategies.quantised import quantised_copy
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import batch_BT, make_cell, make_engine, one_step, token_loss, train, trial_of
from tests.trials import only, run_forked, tiny_cell, tiny_trial

CPU = torch.device("cpu")
SIZES = {
    "iterations": 2, "prompts_per_iteration": 8, "global_batch": 8, "micro_batch": 4, "prompt_length": 12, "response_length": 6,
    "reward_model": "fresh-head", "held_out_rows": 8, "learning_rate": 1e-3,
}  # fmt: skip


def build(model: str, *, scorer: bool = False) -> nn.Module:
    trial = trial_of(make_cell("naive", 1, model=model))
    return build_scorer(trial, fresh_head=True, source="policy") if scorer else build_policy(trial)


def logits(module: nn.Module) -> torch.Tensor:
    ids_BT = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return (output if isinstance(output, torch.Tensor) else output.logits).float()


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16-master"])
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_outputs_are_near_those_of_16_bits_and_not_the_same(model: str, precision: str, scorer: bool) -> None:
    module = build(model, scorer=scorer)
    stored, small = frozen_copy(module, precision, CPU), quantised_copy(module, precision, CPU)
    error = (logits(small) - logits(stored)).abs().max() / logits(stored).abs().max()
    assert 0 < error < 0.05
    assert not small.training
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_linear_layers_are_int8_and_all_else_is_as_stored() -> None:
    module = build("bloom-tiny")
    small = quantised_copy(module, "bf16-master", CPU)
    types = {name: parameter.dtype for name, parameter in small.named_parameters()}
    assert {name.split(".")[-2] for name, dtype in types.items() if dtype == torch.int8} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    assert types["transformer.word_embeddings.weight"] == torch.bfloat16
    layers = [
        sum(parameter.nbytes for parameter in one.transformer.h.parameters()) for one in (frozen_copy(module, "bf16-master", CPU), small)
    ]
    assert layers[1] < 0.55 * layers[0]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(("strategy", "ranks"), [("naive", 1), ("ddp", 2), ("fsdp", 2)])
def test_ppo_with_frozen_models_in_int8_is_near_that_with_stored_ones(strategy: str, ranks: int, tmp_path) -> None:
    parts = {}
    for weights in ("stored", "int8"):
        cell = tiny_cell("ppo", strategy=strategy, processes_per_node=ranks, frozen_weights=weights, **SIZES)
        parts[weights] = only(run_forked(tiny_trial(cell, tmp_path / weights)))
    small, stored = parts["int8"].series, parts["stored"].series
    assert small["reward"] == pytest.approx(stored["reward"], abs=0.05)
    assert small["reward"] != stored["reward"]
    assert small["entropy"][0] == stored["entropy"][0]


def test_what_shards_frozen_models_or_keeps_them_in_host_memory_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.strategies.requirement.installed_version", lambda _: "99")  # DeepSpeed, an extra
    cell = tiny_cell("ppo", strategy="deepspeed_zero3", processes_per_node=2, frozen_weights="int8")
    assert "`frozen_weights: stored`" in str(all_strategies()["deepspeed_zero3"].unsupported(cell))
    cell = tiny_cell("ppo", strategy="ddp", frozen_weights="int8", frozen_placement="host")
    assert "`frozen_placement: device`" in str(all_strategies()["ddp"].unsupported(cell))


# -- the base under LoRA ---------------------------------------------------------------------------------------------


def small_base(strategy: str, ranks: int, kind: str, **changes):
    return make_cell(strategy, ranks, base_weights=kind, **{"lora_rank": 8, "micro_batch": 4, **changes})


@pytest.mark.parametrize("precision", ["fp32", "bf16-master"])
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("nf4", 0.03)])
@pytest.mark.parametrize("model", ["bloom-tiny", "gpt2-tiny"])
def test_lora_learns_on_a_small_base_and_only_adapters_move(model: str, kind: str, error: float, precision: str) -> None:
    seen = run_ranks(train, 1, small_base("naive", 1, kind, precision=precision, model=model), 5)[0]
    stored = run_ranks(train, 1, small_base("naive", 1, "stored", precision=precision, model=model), 5)[0]
    assert seen["losses"][0] == pytest.approx(stored["losses"][0], rel=error)
    assert seen["losses"] != stored["losses"]
    assert seen["losses"][-1] < seen["losses"][0] - 0.0005
    assert seen["moved"].keys() == stored["moved"].keys()
    assert {name for name, change in seen["moved"].items() if change} == {name for name in seen["moved"] if "lora_" in name}
    assert seen["dtypes"] == stored["dtypes"]
    assert seen["summary"] == {name: pytest.approx(norm, rel=0.05, abs=0.05) for name, norm in stored["summary"].items()}


MANY = [
    ("int8", "ddp", 2, "fp32", "bloom-tiny"), ("nf4", "ddp", 2, "fp32", "bloom-tiny"),
    ("int8", "fsdp", 2, "bf16-master", "gpt2-tiny"), ("nf4", "fsdp", 2, "bf16-master", "gpt2-tiny"),
    ("int8", "fsdp", 4, "fp32", "llama-tiny"), ("nf4", "fsdp_grad_op", 2, "fp32", "gpt2-tiny"),
    ("nf4", "fsdp", 2, "fp16-master", "bloom-tiny"), ("int8", "fsdp", 2, "bf16-autocast", "bloom-tiny"),
    ("nf4", "fsdp", 2, "bf16-autocast", "bloom-tiny"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "strategy", "ranks", "precision", "model"), MANY)
def test_ranks_on_a_small_base_are_one_of_naive(kind: str, strategy: str, ranks: int, precision: str, model: str) -> None:
    shared = {"precision": precision, "model": model, "micro_batch": 2}
    many, one = (run_ranks(train, size, small_base(name, size, kind, **shared), 4)[0] for name, size in ((strategy, ranks), ("naive", 1)))
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5 if precision == "fp32" else 1e-3)
    assert many["moved"].keys() == one["moved"].keys()
    assert {name for name, change in many["moved"].items() if change} == {name for name in many["moved"] if "lora_" in name}
    assert many["dtypes"] == one["dtypes"]
    base = [name for name in one["summary"] if "lora_" not in name]
    assert [many["summary"][name] for name in base] == pytest.approx([one["summary"][name] for name in base], rel=1e-6)


def shard_bytes(cell) -> int:
    """Bytes of weights in shards on this rank, and of tables that are whole."""
    _, engine, module = make_engine(cell)
    one_step(engine, cell)
    tables = [buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in ("code", "nested_code")]
    return sum(local(one).untyped_storage().nbytes() for one in module.parameters()) + sum(one.nbytes for one in tables)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_small_base_and_its_scales_lie_in_shards(kind: str) -> None:
    cell = small_base("fsdp", 2, kind, precision="bf16-pure")
    whole_tables = 8 * 4 * 272 if kind == "nf4" else 0  # of eight matrices; theory has them in shares
    for seen in run_ranks(shard_bytes, 2, cell):
        assert seen == pytest.approx(needs(cell).weight_bytes + whole_tables / 2, abs=8 * 32)


def layer_types(cell) -> dict[str, str]:
    _, engine, module = make_engine(cell)
    one_step(engine, cell)
    return {name: str(parameter.dtype) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "torch.int8"), ("nf4", "torch.uint8")])
def test_layers_under_adapters_are_small_and_adapters_are_not(kind: str, dtype: str) -> None:
    types = run_ranks(layer_types, 1, small_base("naive", 1, kind, precision="bf16-master"))[0]
    assert {types[name] for name in types if name.endswith("base_layer.weight")} == {dtype}
    assert {types[name] for name in types if "lora_" in name or "embeddings" in name} == {"torch.bfloat16"}


def stored_bytes(cell) -> dict[str, int]:
    """Bytes of all weights on this rank after a step, with scales and tables; and of inputs that only bitsandbytes keeps for the backward
    pass, out of autograd's sight.
    """
    _, engine, module = make_engine(cell)
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_loss(engine.module, batch_BT(cell, 0))
    known = saved | {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = [tensor for node in graph_of(loss) for tensor in (*getattr(node, "tensors", ()), getattr(node, "A", None)) if tensor is not None]
    assert kept
    one_step(engine, cell)
    gradients = {parameter.grad.untyped_storage().data_ptr() for parameter in module.parameters() if parameter.grad is not None}
    states = [child.state for child in module.modules() if hasattr(child, "state")]  # where 8-bit layers keep their scales
    stored = storages(tensor for slot in walk([*module.parameters(), *states]).slots if (tensor := slot.read()) is not None)
    return {
        "weights": sum(tensor.untyped_storage().nbytes() for address, tensor in stored.items() if address not in gradients),
        "kept beside": sum(tensor.nbytes for tensor in kept if tensor.untyped_storage().data_ptr() not in known),
    }


def graph_of(loss: torch.Tensor) -> set:
    """All nodes of the autograd graph of `loss`."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [one for one, _ in node.next_functions]
    return found


@pytest.mark.parametrize(("model", "precision"), [("bloom-tiny", "fp32"), ("llama-tiny", "bf16-master")])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_theory_of_memory_is_what_bitsandbytes_stores(model: str, kind: str, precision: str) -> None:
    cell = small_base("ddp", 2, kind, model=model, precision=precision)
    for seen in run_ranks(stored_bytes, 2, cell):
        assert seen == {"weights": needs(cell).weight_bytes, "kept beside": 0}


@pytest.mark.parametrize(("strategy", "ranks"), [("naive", 1), ("fsdp", 2)])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_trial_on_a_small_base_trains_saves_and_has_its_evidence(kind: str, strategy: str, ranks: int, tmp_path) -> None:
    sizes = {"steps": 4, "sequence_length": 64, "learning_rate": 1e-2, "held_out_rows": 8}
    cell = tiny_cell("sft", strategy=strategy, processes_per_node=ranks, lora_rank=8, base_weights=kind, **sizes)
    part = only(run_forked(tiny_trial(cell, tmp_path / "trial", save=True)))
    assert part.series["loss"][-1] < part.series["loss"][0]
    assert [check.text for check in part.evidence.checks if check.state == "refuted"] == []
    assert (tmp_path / "trial" / "weights" / "model.safetensors").exists()


def test_a_small_base_is_for_lora_and_for_strategies_that_lay_it_out() -> None:
    of = all_strategies()
    assert "cannot train" in str(of["naive"].unsupported(small_base("naive", 1, "int8", lora_rank=0)))
    assert "`base_weights: stored`" in str(of["zero2"].unsupported(small_base("zero2", 2, "nf4")))
    assert all(of[name].unsupported(small_base(name, 2, "nf4")) is None for name in ("ddp", "fsdp", "fsdp_grad_op"))
