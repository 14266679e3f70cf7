"""What the contract tests run on every rank. Shapes: B sequences, T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cell import Cell, cell_from_json
from bench.matrix import impossible
from bench.models.build import add_lora, build_policy, build_scorer
from bench.rollout.head import HeadWindow
from bench.strategies.base import Engine, PipelinedEngine, Strategy, all_strategies
from bench.strategies.colossal import import_colossalai
from bench.trial import Trial, make_trial
from tests.contract.rank_harness import run_ranks

import_colossalai()
AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=8, hidden_size=8, n_layer=1, n_head=1))  # loads what it names

SEQUENCES, LENGTH = 8, 12
LEARNING_RATE = 1e-3
STEPS = 5
"""Of a run that nothing else is said of."""


@cache
def variants() -> dict[str, dict[str, Any]]:
    """Every way of laying out a model: each strategy, and those that split models also over two ranks either way."""
    found: dict[str, dict[str, Any]] = {name: {"strategy": name} for name in sorted(all_strategies())}
    for name, kind in all_strategies().items():
        if kind.model_parallel:
            found[f"{name}-tensor2"] = {"strategy": name, "tensor_parallel": 2}
            found[f"{name}-pipeline2"] = {"strategy": name, "pipeline_parallel": 2, "micro_batch": 2}
    return found


def kind_of(variant: str) -> Strategy:
    """The strategy of a variant."""
    return all_strategies()[variants()[variant]["strategy"]]


VARIANTS = list(variants())
every_variant = pytest.mark.parametrize("variant", VARIANTS)
at_its_widest = pytest.mark.parametrize(("variant", "ranks"), [(variant, 1 if variant == "naive" else 2) for variant in VARIANTS])
"""On two ranks, but for naive."""


def comparable(variant: str) -> str:
    """The precision mode in which a variant is compared with naive."""
    return "fp32" if "fp32" in kind_of(variant).precisions else "bf16-master"


def tolerance(variant: str) -> float:
    """Of losses; gradient norms get ten times as much: in bf16 every addition of an accumulated gradient is rounded."""
    return 1e-4 if comparable(variant) == "fp32" else 1e-3


def supported(variant: str, ranks: int, **changes: Any) -> Cell:
    """The cell, or a skip with the reason why it cannot run."""
    cell = make_cell(variant, ranks, **changes)
    reason = impossible(cell)
    if reason:
        pytest.skip(reason)
    return cell


def make_cell(variant: str, ranks: int, **changes: Any) -> Cell:
    """A tiny cell of 8 sequences a step, under a strategy or one of its `variants`."""
    content = {
        "stage": "sft", "model": "bloom-tiny", "lora_rank": 0, "processes_per_node": ranks, "steps": 10,
        "precision": "fp32", "device": "cpu", "global_batch": SEQUENCES, "micro_batch": 4, "weight_decay": 0.01, "clip_norm": 1.0,
    }  # fmt: skip
    return cell_from_json({**content, **variants()[variant], **changes})


def make_engine(cell: Cell, module: nn.Module | None = None) -> tuple[Strategy, Engine, nn.Module]:
    """Start the cell's strategy on this rank and lay out its model (or `module`)."""
    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    if module is None:
        module = policy_here(trial_of(cell))
    add_lora(module, cell, seed=7)
    return strategy, strategy.prepare(module, cell, device_of(cell), learning_rate=LEARNING_RATE), module


def policy_here(trial: Trial) -> nn.Module:
    """The language model as a stage builds it on this rank: without weights where its strategy needs none here."""
    return build_policy(trial, shapes=shapes_here(trial.parsed_cell))


def shapes_here(cell: Cell) -> bool:
    return all_strategies()[cell.strategy].shapes_suffice(cell, dist.get_rank())


def device_of(cell: Cell) -> torch.device:
    return torch.device(cell.settings.device)


def trial_of(cell: Cell) -> Trial:
    return make_trial(cell, 0, work="unused")


def batch_BT(cell: Cell, micro_step: int) -> torch.Tensor:
    """This rank's sequences of a micro-step; all of a step's are the same whatever ranks and accumulation are.

    Ranks that hold one model between them get the same.
    """
    all_BT = torch.randint(3, 4000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    size = cell.settings.micro_batch
    first = (micro_step * cell.data_parallel_size + dist.get_rank() // cell.model_parallel_size) * size
    return all_BT[first : first + size].to(device_of(cell))


def token_loss(module: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """The global loss of a micro-batch: its token losses over the loss tokens of the whole step."""
    logits_BTV = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    losses = nn.functional.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
    return losses / (SEQUENCES * (LENGTH - 1))


def one_step(engine: Engine, cell: Cell, loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = token_loss) -> tuple[float, float]:
    """One optimizer step; returns its global loss and gradient norm."""
    batches = [batch_BT(cell, micro_step) for micro_step in range(cell.accumulation)]
    if isinstance(engine, PipelinedEngine):
        total = pipelined(engine, batches, lambda output, ids_BT: loss_of(lambda **_: output, ids_BT))
    else:
        total = torch.zeros((), device=device_of(cell))
        for number, ids_BT in enumerate(batches, 1):
            loss = loss_of(engine.module, ids_BT)
            engine.backward(loss, last=number == len(batches))
            total += loss.detach()
    norm = float(engine.step())  # first: evidence counts the collectives from the first forward pass to here
    return _summed(total) / cell.model_parallel_size, norm


def pipelined(engine: PipelinedEngine, batches: list[torch.Tensor], loss_of: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sum of the losses that `loss_of` makes of the outputs for each micro-batch."""
    ids_BT = torch.cat(batches)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "use_cache": False}
    if not hasattr(engine.module.unwrap(), "lm_head"):
        del inputs["use_cache"]
    return engine.run(inputs, len(batches[0]), lambda output, index: loss_of(output, batches[index]).unsqueeze(0))[0]


def train(cell: Cell, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of `steps` steps, and how far each tensor moved."""
    _, engine, _ = make_engine(cell)
    before = engine.full_state()
    series = [one_step(engine, cell) for _ in range(steps)]
    after = engine.full_state()
    return {
        "losses": [loss for loss, _ in series], "norms": [norm for _, norm in series], "moved": moved(before, after),
        "dtypes": {} if after is None else {name: str(tensor.dtype) for name, tensor in after.items()},
        "summary": None if after is None else {name: tensor.double().norm().item() for name, tensor in after.items()},
    }  # fmt: skip


def moved(before: dict[str, torch.Tensor] | None, after: dict[str, torch.Tensor] | None) -> dict[str, float]:
    """How far each tensor moved between two full states; only rank 0 has them."""
    return {} if before is None or after is None else {name: (after[name] - before[name]).abs().max().item() for name in before}


def trained(variant: str, ranks: int, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """What rank 0 saw of a run of `variant`; equal runs happen once a session."""
    cell = make_cell(variant, ranks, **changes)
    problem = impossible(cell)
    assert problem is None, problem
    return _trained(cell, steps)


@cache
def _trained(cell: Cell, steps: int) -> dict[str, Any]:
    return run_ranks(train, cell.world_size, cell, steps)[0]


def rank_gradients(cell: Cell, unwrap: bool) -> dict[str, list[float]]:
    """Gradients of one step on this rank as the optimizer meets them, and what this rank's own data gave alone.

    `unwrap` plants the mistake of ColossalAI-Chat v0.2.8: training the module inside DDP.
    """
    own = build_policy(trial_of(cell))
    for micro_step in range(cell.accumulation):
        token_loss(own, batch_BT(cell, micro_step)).backward()
    _, engine, module = make_engine(cell)
    called = engine.module.module if unwrap else engine.module
    for micro_step in range(cell.accumulation):
        loss = token_loss(called, batch_BT(cell, micro_step))
        if unwrap:
            loss.backward()
        else:
            engine.backward(loss, last=micro_step == cell.accumulation - 1)
    return {"met": _some_gradients(module), "own": _some_gradients(own)}


def _some_gradients(module: nn.Module) -> list[float]:
    return [value for parameter in module.parameters() for value in parameter.grad.flatten()[:50].tolist()]


def generate(cell: Cell) -> dict[str, Any]:
    """After a training step: greedy tokens and logits step by step with a KV cache, and those of whole forward passes."""
    _, engine, _ = make_engine(cell)
    one_step(engine, cell)
    engine.module.eval()
    prompt_BT = torch.randint(3, 4000, (2, 5), generator=torch.Generator().manual_seed(2)).to(device_of(cell))
    with torch.no_grad():
        tokens_BT, cached = _greedy_cached(engine.module, prompt_BT, 4)
        whole_BTV = engine.module(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT)).logits
    engine.module.train()
    whole = whole_BTV[:, 4:-1].float()
    loss, _ = one_step(engine, cell)
    return {"difference": (cached - whole).abs().max().item(), "same": bool((whole.argmax(-1) == tokens_BT[:, 5:]).all()), "loss": loss}


def _greedy_cached(module: nn.Module, prompt_BT: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BT, given, past, logits = prompt_BT, prompt_BT, None, []
    for _ in range(steps):
        output = module(input_ids=given, attention_mask=torch.ones_like(tokens_BT), past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[:, -1].float())
        given = logits[-1].argmax(-1, keepdim=True)
        tokens_BT = torch.cat([tokens_BT, given], dim=1)
    return tokens_BT, torch.stack(logits, dim=1)


def two_engines(cell: Cell, steps: int) -> dict[str, list[float]]:
    """A policy and a critic that train in turn, beside a frozen reference that both are scored against."""
    strategy, policy, _ = make_engine(cell)
    critic = strategy.prepare(_critic(cell), cell, device_of(cell), learning_rate=LEARNING_RATE)
    reference = strategy.place_frozen(policy_here(trial_of(cell)), cell, device_of(cell))
    series: dict[str, list[float]] = {"policy": [], "critic": [], "reference": []}
    for _ in range(steps):
        with torch.no_grad():
            series["reference"].append(_summed(token_loss(reference, batch_BT(cell, 0))))
            token_loss(policy.module, batch_BT(cell, 0))
        series["policy"].append(one_step(policy, cell)[0])
        series["critic"].append(one_step(critic, cell, value_loss)[0])
    return series


def _critic(cell: Cell) -> nn.Module:
    critic = build_scorer(trial_of(cell), fresh_head=True, source="policy")
    add_lora(critic, cell, seed=8)
    return critic


def value_loss(module: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Squared distance of every score from 1, over all positions of the step."""
    scores_BT = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return (scores_BT - 1.0).square().sum() / (SEQUENCES * LENGTH)


def _summed(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def pair_loss(module: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Two forward passes and one backward pass, as a preference pair may take."""
    return token_loss(module, ids_BT) + token_loss(module, ids_BT.flip(1))


def train_pairs(cell: Cell, steps: int) -> list[float]:
    _, engine, _ = make_engine(cell)
    return [one_step(engine, cell, pair_loss)[0] for _ in range(steps)]


def round_trip(cell: Cell, scorer: bool, folder: str) -> dict[str, float]:
    """Train, save the full state, load it into a fresh model; how far that model's outputs are from the live one's."""
    from bench.checkpoint import load_checkpoint, save_checkpoint

    module = build_scorer(trial_of(cell), fresh_head=True, source="policy") if scorer else build_policy(trial_of(cell))
    facts = add_lora(module, cell, seed=7)
    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    config = module.config
    engine = strategy.prepare(module, cell, device_of(cell), learning_rate=0.02)
    for _ in range(3):
        one_step(engine, cell, value_loss if scorer else token_loss)
    state = engine.full_state()
    live = _pipelined_outputs(engine, scorer) if isinstance(engine, PipelinedEngine) else _outputs(engine.module, scorer)
    if state is None:
        return {}
    save_checkpoint(Path(folder), state=state, config=config, stage="rm" if scorer else "sft", tokenizer=None, started_from={}, lora=facts)
    plain = make_cell("naive", 1, model=cell.model)
    fresh = build_scorer(trial_of(plain), fresh_head=True, source="policy") if scorer else build_policy(trial_of(plain))
    untrained = _outputs(fresh, scorer)
    load_checkpoint(fresh, Path(folder), part="all")
    loaded = _outputs(fresh, scorer)
    return {"difference": (loaded - live).abs().max().item(), "learned": (untrained - live).abs().max().item()}


def _probe_BT() -> torch.Tensor:
    return torch.randint(3, 4000, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def _pipelined_outputs(engine: PipelinedEngine, scorer: bool) -> torch.Tensor:
    """Outputs of the last stage, on every rank."""
    seen: list[torch.Tensor] = []

    def see(output: Any, _: torch.Tensor) -> torch.Tensor:
        seen.append((output if scorer else output.logits).float())
        return seen[0].sum()

    with torch.no_grad():
        pipelined(engine, [_probe_BT()], see)
    told = [seen[0] if seen else None]
    dist.broadcast_object_list(told, src=dist.get_world_size() - 1)
    return told[0]  # type: ignore[return-value]


def _outputs(module: nn.Module, scorer: bool) -> torch.Tensor:
    ids_BT = _probe_BT().to(next(module.parameters()).device)
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return (output if scorer else output.logits.float()).cpu()


def overflow(cell: Cell) -> dict[str, Any]:
    """A step whose gradients overflow fp16, then one as usual."""
    _, engine, _ = make_engine(cell)
    before = engine.full_state()
    _, first = one_step(engine, cell, lambda module, ids_BT: token_loss(module, ids_BT) * 1e6)
    between = engine.full_state()
    second = one_step(engine, cell)
    after = engine.full_state()
    return {"norm": first, "moved": moved(before, between), "next": second, "moved_next": moved(before, after)}


def windowed(cell: Cell) -> list[int]:
    """Shape of the logits inside a window of two positions."""
    module = build_policy(trial_of(cell))
    window = HeadWindow(module)
    _, engine, _ = make_engine(cell, module)
    ids_BT = batch_BT(cell, 0)
    with window.positions(slice(-2, None)):
        logits = engine.module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    return list(logits.shape)


def without_colossalai(cell: Cell) -> float:
    """One step after ColossalAI became impossible to import."""
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "colossalai"]:
        del sys.modules[name]
    sys.modules["colossalai"] = None  # type: ignore[assignment]
    try:
        import colossalai  # noqa: F401
    except ImportError:
        _, engine, _ = make_engine(cell)
        return one_step(engine, cell)[0]
    raise AssertionError("colossalai can still be imported")


def learning_rates(cell: Cell) -> list[dict[str, float]]:
    """How far the weights move in a step at learning rates 0 and 0.01."""
    _, engine, _ = make_engine(cell)
    moves = []
    for value in (0.0, 0.01):
        before = engine.full_state()
        engine.set_learning_rate(value)
        one_step(engine, cell)
        moves.append(moved(before, engine.full_state()))
    return moves
