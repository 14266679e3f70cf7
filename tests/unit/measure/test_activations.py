"""What layers keep for the backward pass, against the tensors that autograd really saves in models of transformers.

The models run torch's scaled_dot_product_attention on a CPU, whose kernel keeps what those of a GPU keep: queries, keys, values,
output and one number a row. The formula leaves that number and the norms' statistics out, most visible in models as narrow as these.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.measure.activations import CHUNK_ELEMENTS, cache_bytes, head_bytes, kept_bytes
from bench.measure.flops import Sequences
from bench.measure.shape import Network, Shape, config_sizes, shape_of, shape_of_config
from bench.models.build import add_lora, backbone, checkpoint_activations
from bench.models.presets import PRESETS
from bench.rl import losses

MODELS = ("bloom-tiny", "gpt2-tiny", "opt-tiny", "llama-tiny", "llama3-tiny", "mistral-tiny", "qwen2-tiny")
WORK = Sequences(count=2, length=96)


def a_shape(name: str) -> Shape:
    shape = shape_of(name)
    assert shape is not None
    return shape


def model_of(name: str, layers: int, dtype: torch.dtype, rank: int) -> Any:
    preset = PRESETS[name]
    key = "n_layer" if "n_layer" in preset.config or preset.model_type == "gpt2" else "num_hidden_layers"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **{**preset.config, key: layers}))
    if rank:
        add_lora(model, SimpleNamespace(lora_rank=rank, lora_alpha=8.0), 1)
    return model.to(dtype).train()


def saved_bytes(model: Any) -> int:
    """Bytes of all storages that one forward pass of the layers saves, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address is given twice
        return tensor

    ids = torch.randint(0, 4096, (int(WORK.count), int(WORK.length)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(found.values())


def difference(name: str, dtype: torch.dtype, rank: int = 0, *, checkpointing: bool = False) -> float:
    """What two more layers save."""
    models = [model_of(name, layers, dtype, rank) for layers in (2, 4)]
    if checkpointing:
        for model in models:
            checkpoint_activations(model)
    few, many = map(saved_bytes, models)
    return many - few


def formula(name: str, precision: str, rank: int = 0) -> float:
    """Of the two layers that the preset has."""
    shape = a_shape(name)
    assert shape.layers == 2
    return kept_bytes(Network(shape=shape, lora_rank=rank), WORK, precision)


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_in_a_record_give_the_shape(name: str) -> None:
    preset = PRESETS[name]
    config = AutoConfig.for_model(preset.model_type, **preset.config)
    assert shape_of_config(json.loads(json.dumps(config_sizes(config.to_dict())))) == a_shape(name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16-master", torch.bfloat16)])
@pytest.mark.parametrize("rank", [0, 8])
def test_layers_keep_what_autograd_saves(name: str, precision: str, dtype: torch.dtype, rank: int) -> None:
    assert formula(name, precision, rank) == pytest.approx(difference(name, dtype, rank), rel=0.035)


def test_a_quadratic_part_only_where_attention_weights_are_kept() -> None:
    """BLOOM: 4 + 2 bytes x heads x positions squared; the others none."""
    for name, square in (("bloom-tiny", 6 * 4), ("llama-tiny", 0)):
        network = Network(shape=a_shape(name))
        one, two = (kept_bytes(network, Sequences(count=1, length=length), "bf16-master") for length in (100, 200))
        assert two - 2 * one == pytest.approx(2 * square * 2 * 100**2)


@pytest.mark.parametrize("name", ["bloom-tiny", "llama-tiny"])
def test_checkpointing_keeps_the_input_of_each_layer(name: str) -> None:
    shape = a_shape(name)
    deep = [Network(shape=dataclasses.replace(shape, layers=layers)) for layers in (2, 4)]
    few, many = (kept_bytes(network, WORK, "bf16-master", checkpointing=True) for network in deep)
    assert many - few == difference(name, torch.bfloat16, checkpointing=True) == 2 * 2 * 64 * WORK.positions


def test_autocast_adds_the_wide_stream_and_copies_of_the_weights() -> None:
    network = Network(shape=a_shape("bloom-tiny"))
    extra = kept_bytes(network, WORK, "bf16-autocast") - kept_bytes(network, WORK, "bf16-master")
    assert extra == 2 * (4 * 64 * WORK.positions + 2 * 12 * 64**2)


def test_the_head_holds_logits_their_gradient_and_chunks() -> None:
    shape = a_shape("bloom-560m")
    assert losses.CHUNK_ELEMENTS == CHUNK_ELEMENTS
    assert head_bytes(shape, 100, "fp32") == 100 * 250_880 * (2 * 4 + 2 * 4)
    assert head_bytes(shape, 1000, "bf16-master", gradient=False) == 2 * 1000 * 250_880 + 3 * 4 * (267 * 250_880)


def test_a_cache_holds_keys_and_values_of_key_heads_only() -> None:
    """LLaMA-3 in small: 2 layers, 2 key heads of 16; 3 sequences of 10."""
    assert cache_bytes(a_shape("llama3-tiny"), sequences=3, length=10, precision="bf16-master") == 2 * 2 * 32 * 2 * 30
