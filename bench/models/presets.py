"""Model sizes as data. Torch-free.

A preset is an architecture of transformers (`model_type` and its configuration) and, where there is one, the hub
repository that has weights of exactly this shape. Dropout is 0 everywhere: a loss curve must not depend on how many random
numbers a strategy draws.

Sources: BLOOM, LLaMA, OPT and GPT-2 papers and their hub configurations; the GPT-2 and OPT sizes that are not on the hub
are those of ColossalAI v0.2.8, applications/Chat/benchmarks/benchmark_gpt_dummy.py and benchmark_opt_lora_dummy.py.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UserError, shown
from bench.layout import expanded


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """An architecture with all of its numbers."""

    name: str
    model_type: str
    """transformers' name of the architecture."""
    config: dict[str, Any]
    """Arguments of its configuration class; what is missing keeps transformers' default."""
    hub_id: str | None = None
    """Repository with weights of this shape, for `weights: pretrained`."""
    revision: str | None = None
    """Pinned commit of that repository; null takes its main branch, and the commit that was loaded is recorded."""
    source: str
    """Where the numbers come from."""


TINY_VOCABULARY = 4096

_BLOOM_PAPER = "BigScience, BLOOM, arXiv:2211.05100, table 3"
_LLAMA_PAPER = "Touvron et al., LLaMA, arXiv:2302.13971, table 2"
_OPT_PAPER = "Zhang et al., OPT, arXiv:2205.01068, table 1"
_GPT2_PAPER = "Radford et al., Language Models are Unsupervised Multitask Learners, table 2"
_GPT_BENCHMARK = "ColossalAI v0.2.8, benchmark_gpt_dummy.py"
_OPT_BENCHMARK = "ColossalAI v0.2.8, benchmark_opt_lora_dummy.py"
_TINY = "two layers, for tests and the CPU quick start; no published model"


def _bloom(name: str, hidden: int, layers: int, heads: int, *, vocabulary: int = 250880, hub: bool = True, **rest: Any) -> Preset:
    config = {
        "vocab_size": vocabulary, "hidden_size": hidden, "n_layer": layers, "n_head": heads, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return Preset(
        name=f"bloom-{name}",
        model_type="bloom",
        config=config,
        hub_id=f"bigscience/bloom-{name}" if hub else None,
        **{"source": _BLOOM_PAPER, **rest},
    )


def _gpt2(name: str, hidden: int, layers: int, heads: int, *, positions: int = 1024, vocabulary: int = 50257, **rest: Any) -> Preset:
    config = {
        "vocab_size": vocabulary, "n_positions": positions, "n_embd": hidden, "n_layer": layers, "n_head": heads,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0,
    }  # fmt: skip
    return Preset(name=f"gpt2-{name}", model_type="gpt2", config=config, **{"source": _GPT_BENCHMARK, **rest})


def _opt(name: str, hidden: int, layers: int, heads: int, *, positions: int = 2048, vocabulary: int = 50272, **rest: Any) -> Preset:
    config = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "ffn_dim": 4 * hidden, "num_attention_heads": heads,
        "max_position_embeddings": positions, "word_embed_proj_dim": hidden, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
    }  # fmt: skip
    return Preset(name=f"opt-{name}", model_type="opt", config=config, **{"source": _OPT_BENCHMARK, **rest})


def _llama_like(name: str, model_type: str, hidden: int, layers: int, heads: int, inner: int, **rest: Any) -> Preset:
    preset = {key: rest.pop(key) for key in ("hub_id", "revision", "source") if key in rest}
    config = {
        "vocab_size": 32000, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
        "attention_dropout": 0.0, **rest,
    }  # fmt: skip
    return Preset(name=name, model_type=model_type, config=config, **{"source": _TINY, **preset})


_TINY_NUMBERS: dict[str, Any] = {"vocab_size": TINY_VOCABULARY, "max_position_embeddings": 1024}

_LISTED = (
    _bloom("tiny", 64, 2, 4, vocabulary=TINY_VOCABULARY, hub=False, source=_TINY),
    _bloom("560m", 1024, 24, 16, revision="ac2ae5fab2ce3f9f40dc79b5ca9f637430d24971"),
    _bloom("1b1", 1536, 24, 16),
    _bloom("1b7", 2048, 24, 16),
    _bloom("3b", 2560, 30, 32),
    _bloom("7b1", 4096, 30, 32),
    _gpt2("tiny", 64, 2, 4, vocabulary=TINY_VOCABULARY, source=_TINY),
    _gpt2("s", 768, 12, 12, hub_id="openai-community/gpt2", source=_GPT2_PAPER),
    _gpt2("m", 1024, 24, 16, hub_id="openai-community/gpt2-medium", source=_GPT2_PAPER),
    _gpt2("l", 1280, 36, 20, hub_id="openai-community/gpt2-large", source=_GPT2_PAPER),
    _gpt2("xl", 1600, 48, 25, hub_id="openai-community/gpt2-xl", source=_GPT2_PAPER),
    _gpt2("2b", 2048, 40, 16),
    _gpt2("4b", 2304, 64, 16),
    _gpt2("6b", 4096, 30, 16),
    _gpt2("8b", 4096, 40, 16),
    _gpt2("10b", 4096, 50, 16),
    _gpt2("12b", 4096, 60, 16),
    _gpt2("15b", 4096, 78, 16),
    _gpt2("18b", 4096, 90, 16),
    _gpt2("20b", 8192, 25, 16),
    _gpt2("24b", 8192, 30, 16),
    _gpt2("28b", 8192, 35, 16),
    _gpt2("32b", 8192, 40, 16),
    _gpt2("36b", 8192, 45, 16),
    _gpt2("40b", 8192, 50, 16),
    _gpt2("175b", 12288, 96, 96, positions=2048),
    _opt("tiny", 64, 2, 4, positions=1024, vocabulary=TINY_VOCABULARY, source=_TINY),
    _opt("125m", 768, 12, 12, hub_id="facebook/opt-125m", source=_OPT_PAPER),
    # The hub's opt-350m has another shape (post-norm, 512 wide embeddings); the old benchmark's is meant here.
    _opt("350m", 1024, 24, 16),
    _opt("700m", 1280, 36, 20),
    _opt("1.3b", 2048, 24, 32, hub_id="facebook/opt-1.3b", source=_OPT_PAPER),
    _opt("2.7b", 2560, 32, 32, hub_id="facebook/opt-2.7b", source=_OPT_PAPER),
    _opt("3.5b", 3072, 32, 32),
    _opt("5.5b", 3840, 32, 32),
    _opt("6.7b", 4096, 32, 32, hub_id="facebook/opt-6.7b", source=_OPT_PAPER),
    _opt("10b", 5120, 32, 32),
    _opt("13b", 5120, 40, 40, hub_id="facebook/opt-13b", source=_OPT_PAPER),
    _llama_like("llama-tiny", "llama", 64, 2, 4, 176, **_TINY_NUMBERS),
    _llama_like(
        "llama-1b",
        "llama",
        2048,
        18,
        16,
        5504,
        max_position_embeddings=2048,
        source="width of LLaMA-7B halved, 18 layers; no published model",
    ),
    _llama_like("llama-7b", "llama", 4096, 32, 32, 11008, max_position_embeddings=2048, hub_id="huggyllama/llama-7b", source=_LLAMA_PAPER),
    _llama_like(
        "llama-13b", "llama", 5120, 40, 40, 13824, max_position_embeddings=2048, hub_id="huggyllama/llama-13b", source=_LLAMA_PAPER
    ),
    _llama_like("llama3-tiny", "llama", 64, 2, 4, 176, num_key_value_heads=2, rope_theta=500000.0, **_TINY_NUMBERS),
    _llama_like("mistral-tiny", "mistral", 64, 2, 4, 176, num_key_value_heads=2, sliding_window=None, **_TINY_NUMBERS),
    _llama_like(
        "qwen2-tiny",
        "qwen2",
        64,
        2,
        4,
        176,
        num_key_value_heads=2,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=True,
        **_TINY_NUMBERS,
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _LISTED}
"""Every preset by name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_problem(name: str) -> str | None:
    """Why `name` names no model, or None: a preset, a folder with config.json and a hub id `org/name` do."""
    if name in PRESETS:
        return None
    try:
        folder = expanded(name)
    except UserError as error:
        return str(error)
    if (folder / "config.json").is_file():
        return _config_problem(_read_config(folder / "config.json"))
    if folder.exists():
        return "this path has no config.json; a model folder has one, next to its weights"
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return None
    close = difflib.get_close_matches(name, PRESETS, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"no preset, model folder or hub id (org/name) is called so; {meant}presets: {', '.join(PRESETS)}"


def parameter_count(name: str) -> int | None:
    """Parameters of the language model `name`, a tied head counted once; from the configuration's numbers alone.

    None where the numbers are not at hand (a hub id) or the architecture is not one of those below.

    >>> parameter_count("bloom-560m"), parameter_count("llama-7b"), parameter_count("org/unknown")
    (559214592, 6738415616, None)
    """
    return config_parameter_count(config_numbers(name))


def config_parameter_count(config: dict[str, Any]) -> int | None:
    """Parameters of the language model with this configuration, as transformers writes it; see `parameter_count`."""
    count = _COUNTS.get(str(config.get("model_type")))
    try:
        return count(config) if count else None
    except KeyError:
        return None


def vocabulary_size(name: str) -> int | None:
    """Embeddings of the model `name`, which is as many tokens as its tokenizer may have; None where the numbers are not at hand.

    >>> vocabulary_size("bloom-560m"), vocabulary_size("bloom-tiny"), vocabulary_size("org/unknown")
    (250880, 4096, None)
    """
    size = config_numbers(name).get("vocab_size")
    return size if isinstance(size, int) else None


def config_numbers(name: str) -> dict[str, Any]:
    """The configuration of a preset or of a model folder; empty where there is none to be read, or a wrong one (`model_problem`)."""
    if preset := PRESETS.get(name):
        return {**preset.config, "model_type": preset.model_type}
    with suppress(UserError):
        config = _read_config(expanded(name) / "config.json")
        return {} if config is None or _config_problem(config) else config
    return {}


def _read_config(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _config_problem(config: dict[str, Any] | None) -> str | None:
    """Why this is the configuration of no model, or None; the sizes are looked at of the architectures below, others have their own."""
    if config is None:
        return "config.json of this folder is no JSON object; a model folder has one that transformers wrote"
    family = config.get("model_type", "")
    if not isinstance(family, str):
        return f"config.json of this folder has no architecture; seen: model_type {shown(family)}; its name in transformers would be right"
    return _size_problem(config) if family in _COUNTS else None


def _size_problem(config: dict[str, Any]) -> str | None:
    wrong = "config.json of this folder has a wrong size; seen:"
    for name, most in _MOST.items():
        if not _is_size(config.get(name, 1), most) and not (name in _MAY_BE_NULL and config[name] is None):
            return f"{wrong} {name} {shown(config[name])}; a whole number from 1 to {most} would be right"
    width, heads = (next((config[name] for name in names if name in config), 1) for names in (_WIDTHS, _HEADS))
    if width % heads and not config.get("head_dim"):
        return f"{wrong} {heads} heads for a width of {width}; a divisor of it would be right"
    return None


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


_WIDTHS, _HEADS = ("hidden_size", "n_embd"), ("num_attention_heads", "n_head")
_MOST = {
    **dict.fromkeys(("n_layer", "num_hidden_layers"), 100_000),
    **dict.fromkeys((*_WIDTHS, *_HEADS, "vocab_size", "n_positions", "n_inner", "num_key_value_heads", "head_dim", "intermediate_size",
                     "ffn_dim", "word_embed_proj_dim", "max_position_embeddings"), 2**31 - 1),
}  # fmt: skip
"""Size in config.json -> the most that it can be: what is larger is a slip, and would be built for hours."""
_MAY_BE_NULL = ("n_inner", "num_key_value_heads", "head_dim")


def _count_bloom(config: dict[str, Any]) -> int:
    hidden, layers = config["hidden_size"], config["n_layer"]
    return config["vocab_size"] * hidden + layers * (12 * hidden**2 + 13 * hidden) + 4 * hidden


def _count_gpt2(config: dict[str, Any]) -> int:
    hidden, layers = config["n_embd"], config["n_layer"]
    return (config["vocab_size"] + config["n_positions"]) * hidden + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden


def _count_opt(config: dict[str, Any]) -> int | None:
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["ffn_dim"]
    if config["word_embed_proj_dim"] != hidden:
        return None
    per_layer = 4 * (hidden**2 + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    return (config["vocab_size"] + config["max_position_embeddings"] + 2) * hidden + layers * per_layer + 2 * hidden


def _count_llama_like(config: dict[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    biases = queries + 2 * keys if config.get("attention_bias") or config.get("model_type") == "qwen2" else 0
    per_layer = 2 * hidden * queries + 2 * hidden * keys + biases + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + config["num_hidden_layers"] * per_layer + hidden


def _count_qwen2(config: dict[str, Any]) -> int:
    return _count_llama_like({**config, "model_type": "qwen2"})


_COUNTS: dict[str, Callable[[dict[str, Any]], int | None]] = {
    "bloom": _count_bloom, "gpt2": _count_gpt2, "opt": _count_opt,
    "llama": _count_llama_like, "mistral": _count_llama_like, "qwen2": _count_qwen2,
}  # fmt: skip
