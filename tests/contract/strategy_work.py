"""What the contract tests run on every rank. Shapes: B sequences, T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.cell import Cell, cell_from_json
from bench.models.build import add_lora, build_policy, build_scorer
from bench.strategies.base import Engine, Strategy, all_strategies
from bench.strategies.colossal import import_colossalai
from bench.trial import Trial, make_trial
from tests.contract.rank_harness import run_ranks

import_colossalai()

SEQUENCES, LENGTH = 8, 12
LEARNING_RATE = 1e-3


def make_cell(strategy: str, ranks: int, **changes: Any) -> Cell:
    """A tiny cell of 8 sequences a step."""
    content = {
        "stage": "sft", "model": "bloom-tiny", "strategy": strategy, "lora_rank": 0, "processes_per_node": ranks, "steps": 10,
        "precision": "fp32", "device": "cpu", "global_batch": SEQUENCES, "micro_batch": 4, "weight_decay": 0.01, "clip_norm": 1.0,
    }  # fmt: skip
    return cell_from_json({**content, **changes})


def make_engine(cell: Cell, module: nn.Module | None = None) -> tuple[Strategy, Engine, nn.Module]:
    """Start the cell's strategy on this rank and lay out its model (or `module`)."""
    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    if module is None:
        module = build_policy(trial_of(cell))
    add_lora(module, cell, seed=7)
    return strategy, strategy.prepare(module, cell, device_of(cell), learning_rate=LEARNING_RATE), module


def device_of(cell: Cell) -> torch.device:
    return torch.device(cell.settings.device)


def trial_of(cell: Cell) -> Trial:
    return make_trial(cell, 0, work="unused")


def batch_BT(cell: Cell, micro_step: int) -> torch.Tensor:
    """This rank's sequences of a micro-step; all of a step's are the same whatever ranks and accumulation are."""
    all_BT = torch.randint(3, 4000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    size = cell.settings.micro_batch
    first = (micro_step * dist.get_world_size() + dist.get_rank()) * size
    return all_BT[first : first + size].to(device_of(cell))


def token_loss(module: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """The global loss of a micro-batch: its token losses over the loss tokens of the whole step."""
    logits_BTV = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    losses = nn.functional.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
    return losses / (SEQUENCES * (LENGTH - 1))


def one_step(engine: Engine, cell: Cell, loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor] = token_loss) -> tuple[float, float]:
    """One optimizer step; returns its global loss and gradient norm."""
    total = torch.zeros((), device=device_of(cell))
    for micro_step in range(cell.accumulation):
        loss = loss_of(engine.module, batch_BT(cell, micro_step))
        engine.backward(loss, last=micro_step == cell.accumulation - 1)
        total += loss.detach()
    dist.all_reduce(total)
    return total.item(), float(engine.step())


def train(cell: Cell, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of `steps` steps, and how far each tensor moved."""
    _, engine, _ = make_engine(cell)
    before = engine.full_state()
    series = [one_step(engine, cell) for _ in range(steps)]
    after = engine.full_state()
    moved = {} if before is None or after is None else {name: (after[name] - before[name]).abs().max().item() for name in before}
    return {
        "losses": [loss for loss, _ in series], "norms": [norm for _, norm in series], "moved": moved,
        "dtypes": {} if after is None else {name: str(tensor.dtype) for name, tensor in after.items()},
        "summary": None if after is None else {name: tensor.double().norm().item() for name, tensor in after.items()},
    }  # fmt: skip


@cache
def trained(strategy: str, ranks: int, steps: int = 10, **changes: Any) -> dict[str, Any]:
    """What rank 0 saw of a run of `strategy`; each run happens once a session."""
    cell = make_cell(strategy, ranks, **changes)
    problem = all_strategies()[strategy].unsupported(cell)
    assert problem is None, problem
    return run_ranks(train, ranks, cell, steps)[0]


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
    reference = strategy.place_frozen(build_policy(trial_of(cell)), cell, device_of(cell))
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
    live = _outputs(engine.module, scorer)
    if state is None:
        return {}
    save_checkpoint(Path(folder), state=state, config=config, stage="rm" if scorer else "sft", tokenizer=None, started_from={}, lora=facts)
    plain = make_cell(cell.strategy, cell.world_size, model=cell.model)
    fresh = build_scorer(trial_of(plain), fresh_head=True, source="policy") if scorer else build_policy(trial_of(plain))
    untrained = _outputs(fresh, scorer)
    load_checkpoint(fresh, Path(folder), part="all")
    loaded = _outputs(fresh, scorer)
    return {"difference": (loaded - live).abs().max().item(), "learned": (untrained - live).abs().max().item()}


def _outputs(module: nn.Module, scorer: bool) -> torch.Tensor:
    device = next(module.parameters()).device
    ids_BT = torch.randint(3, 4000, (2, LENGTH), generator=torch.Generator().manual_seed(3)).to(device)
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
    return {
        "norm": first, "moved": max((between[name] - before[name]).abs().max().item() for name in before),
        "next": second, "moved_next": max((after[name] - before[name]).abs().max().item() for name in before),
    }  # fmt: skip


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


def learning_rates(cell: Cell) -> list[float]:
    """How far the weights move in a step at learning rates 0 and 0.01."""
    _, engine, _ = make_engine(cell)
    moves = []
    for value in (0.0, 0.01):
        before = engine.full_state()
        engine.set_learning_rate(value)
        one_step(engine, cell)
        after = engine.full_state()
        moves.append(max((after[name] - before[name]).abs().max().item() for name in before))
    return moves
