"""Evidence in real ranks: every strategy shows that it is active, and planted lies make the trial invalid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.record import Check, Evidence, Part
from bench.strategies.base import PipelinedEngine, Strategy, all_strategies
from bench.strategies.colossal import import_colossalai
from bench.strategies.ddp import DdpEngine
from bench.strategies.precision import place, trainable
from bench.strategies.replicated import ReplicatedEngine
from tests.trials import run_forked, tiny_cell, tiny_trial

import_colossalai()

STRATEGIES = sorted(all_strategies())
SIZES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 6, "lap_steps": 2, "sequence_length": 48, "learning_rate": 1e-2},
    "rm": {"steps": 6, "lap_steps": 2, "sequence_length": 48, "learning_rate": 5e-3},
    "ppo": {
        "iterations": 2, "prompts_per_iteration": 8, "prompt_length": 8, "response_length": 6, "sequence_length": 48, "lap_steps": 1,
        "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


def run(root: Any, strategy: str, stage: str = "sft", ranks: int = 2, **changes: Any) -> list[Part]:
    """A trial of 8 sequences a step, 2 micro-steps on each of 2 ranks."""
    sizes = {**SIZES[stage], "global_batch": 8, "micro_batch": 2, "held_out_rows": 4}
    cell = tiny_cell(stage, strategy=strategy, nodes=ranks, **{**sizes, **changes})
    if reason := all_strategies()[strategy].unsupported(cell):
        pytest.skip(reason)
    return run_forked(tiny_trial(cell, root / f"{len(list(root.iterdir()))}-{cell.cell_id}"))


def evidence(part: Part) -> Evidence:
    assert part.evidence is not None, part.reason
    return part.evidence


def check(part: Part, what: str, model: str = "policy") -> Check:
    (found,) = [item for item in evidence(part).checks if (item.what, item.model) == (what, model)]
    return found


def refuted(parts: list[Part]) -> set[str]:
    """What was refuted on any rank, in a trial that is invalid because of it."""
    assert {part.outcome for part in parts} <= {"invalid", "ok"}, [part.reason for part in parts]
    for part in parts:
        assert (part.outcome == "invalid") == bool(evidence(part).refuted)
        assert all(item.text in str(part.reason) for item in evidence(part).refuted)
    return {item.what for part in parts for item in evidence(part).refuted}


# ---------------------------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_shows_that_it_is_active(root, strategy):
    kind, ranks = all_strategies()[strategy], 1 if strategy == "naive" else 2
    precision = "bf16-master" if "bf16-master" in kind.precisions else "fp32"
    for part in run(root, strategy, ranks=ranks, precision=precision, lora_rank=4, micro_batch=2):
        assert part.outcome == "ok", part.reason
        shown = {item.what for item in evidence(part).checks if item.state == "shown"}
        assert {"trainable", "optimizer", "gradient norm", "moved", "unmoved", "micro-steps"} <= shown
        assert ("reduced" in shown) == (ranks > 1)
        assert ("gathered" in shown) == bool(ranks > 1 and kind.sharded & {"parameters", "optimizer"})
        assert evidence(part).state == "shown"
        assert evidence(part).traced == "the first step, in the first warm-up lap"
        assert part.seconds["evidence"] < 2.0


def test_bytes_are_those_of_the_declared_shares(root):
    ddp, zero = run(root, "ddp")[0], run(root, "zero2")[0]
    parameters = 362_368
    assert [check(ddp, what).seen for what in ("parameters", "gradients")] == [4 * parameters, 4 * parameters]
    assert check(ddp, "optimizer").seen == pytest.approx(8 * parameters, rel=0.01)
    assert [check(zero, what).seen for what in ("parameters", "gradients")] == [4 * parameters, 2 * parameters]
    assert check(zero, "optimizer").seen == pytest.approx(4 * parameters, rel=0.01)
    assert evidence(ddp).collectives["policy"]["all-reduce"].bytes == 4 * parameters
    assert evidence(zero).collectives["policy"]["all-gather"].bytes == 4 * parameters
    assert evidence(zero).collectives["policy"]["reduce-scatter"].bytes == 2 * 4 * parameters  # stage 2: in each micro-step


@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "fp32"), ("gemini", "bf16-master")])
def test_ppo_has_evidence_of_both_models_that_train_and_both_that_do_not(root, strategy, precision):
    for part in run(root, strategy, "ppo", precision=precision, lora_rank=4):
        assert part.outcome == "ok", part.reason
        assert evidence(part).collectives.keys() == {"policy", "critic"}
        for model in ("policy", "critic"):
            states = {check(part, what, model).state for what in ("trainable", "optimizer", "reduced", "moved", "unmoved")}
            assert states == {"shown"}
        assert {check(part, "unmoved", model).state for model in ("reference", "reward")} == {"shown"}


def test_one_rank_has_no_collectives_and_says_so(root):
    (part,) = run(root, "naive", "rm", ranks=1)
    assert {check(part, what, "reward").state for what in ("reduced", "gathered")} == {"not applicable"}
    assert evidence(part).collectives == {"reward": {}}


def test_a_trial_of_a_single_lap_is_traced_after_all_that_is_measured(root):
    (whole,) = run(root, "naive", ranks=1, steps=4, lap_steps=2)
    (single,) = run(root, "naive", ranks=1, steps=4, lap_steps=4)
    assert evidence(single).traced == "the last step once more, after all that was measured"
    assert single.series == whole.series
    assert single.held_out == whole.held_out
    assert [item.state for item in evidence(single).checks] == [item.state for item in evidence(whole).checks]


def test_tracing_changes_no_loss(root, monkeypatch):
    traced = run(root, "gemini", precision="bf16-master")[0]
    monkeypatch.setattr("bench.measure.evidence.trace.ModelTrace.install", lambda _: None)
    plain = run(root, "gemini", precision="bf16-master")[0]
    assert evidence(plain).collectives == {}
    assert plain.series == traced.series


def test_a_step_that_overflowed_fp16_is_not_the_one_that_is_traced(root, monkeypatch):
    from bench.strategies import zero

    monkeypatch.setattr(zero, "INITIAL_LOSS_SCALE", 2.0**20)
    part = run(root, "zero2", precision="fp16-master", steps=8)[0]
    assert part.outcome == "ok", part.reason
    assert 0 in part.facts["non_finite"]["gradient_norm"]
    assert evidence(part).traced == "the last step once more, after all that was measured"
    assert check(part, "gathered").state == check(part, "optimizer").state == "shown"


# ----------------------------------------------------------------------------------------------------------------- the lies


def lie(monkeypatch, strategy: str, prepare: Any) -> None:
    """Let `strategy` prepare models by `prepare(module, cell, device, learning_rate)`; what its class declares stays."""

    def planted(module: nn.Module, cell: Any, device: torch.device, *, learning_rate: float) -> Any:
        return prepare(module, cell, device, learning_rate)

    monkeypatch.setattr(all_strategies()[strategy], "prepare", planted)


def replicated(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> ReplicatedEngine:
    return ReplicatedEngine(place(module, cell.settings.precision, device), cell, learning_rate=learning_rate)


def ddp(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> DdpEngine:
    return DdpEngine(place(module, cell.settings.precision, device), cell, device, learning_rate=learning_rate)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_ddp_that_is_not_wrapped_is_invalid(root, monkeypatch, stage):
    lie(monkeypatch, "ddp", replicated)
    assert refuted(run(root, "ddp", stage, learning_rate=1e-5)) == {"reduced", "agreement"}


def test_a_ddp_whose_inner_module_is_trained_is_invalid(root, monkeypatch):
    def unwrapped(*arguments: Any) -> DdpEngine:
        engine = ddp(*arguments)
        engine.module = engine._bare
        engine.backward = lambda loss, *, last: loss.backward()  # type: ignore[method-assign]
        return engine

    lie(monkeypatch, "ddp", unwrapped)
    assert "reduced" in refuted(run(root, "ddp"))


def test_a_zero_that_shards_nothing_is_invalid(root, monkeypatch):
    lie(monkeypatch, "zero2", ddp)
    assert refuted(run(root, "zero2")) == {"gradients", "optimizer", "gathered"}
    monkeypatch.undo()
    lie(monkeypatch, "gemini", ddp)
    assert {"parameters", "gradients", "optimizer", "gathered"} == refuted(run(root, "gemini", precision="bf16-master"))


def test_adapters_that_the_optimizer_never_reaches_are_invalid(root, monkeypatch):
    class Detached(ReplicatedEngine):
        """Its optimizer updates copies of the parameters."""

        def _copy_back(self) -> None:
            """The masters stay where they are."""

    def prepare(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> ReplicatedEngine:
        return Detached(place(module, cell.settings.precision, device), cell, learning_rate=learning_rate)

    lie(monkeypatch, "naive", prepare)
    assert refuted(run(root, "naive", ranks=1, lora_rank=4, precision="bf16-master")) == {"adapters"}


def test_frozen_adapters_beside_something_that_trains_are_invalid(root, monkeypatch):
    def prepare(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> ReplicatedEngine:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("ln_f" in name)
        return replicated(module, cell, device, learning_rate)

    lie(monkeypatch, "naive", prepare)
    found = refuted(run(root, "naive", ranks=1, lora_rank=4))
    assert {"trainable", "optimizer", "parameters"} <= found


def test_a_base_that_moves_under_its_adapters_is_invalid(root, monkeypatch):
    class Drifting(ReplicatedEngine):
        def step(self) -> Any:
            norm = super().step()
            self._bare.get_parameter("transformer.h.1.mlp.dense_h_to_4h.base_layer.weight").data.mul_(1.001)
            return norm

    lie(monkeypatch, "naive", lambda module, cell, _, rate: Drifting(module, cell, learning_rate=rate))
    assert refuted(run(root, "naive", ranks=1, lora_rank=4)) == {"unmoved"}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_gemini_that_stopped_learning_under_accumulation_is_invalid(root, monkeypatch, micro_batch):
    """ColossalAI without `enable_gradient_accumulation`: the second micro-step computes with gradients in place of weights."""
    import colossalai.booster.plugin as plugins

    gemini, original = all_strategies()["gemini"], plugins.GeminiPlugin
    prepare = gemini.prepare

    def forgetful(**arguments: Any) -> Any:
        return original(**{**arguments, "enable_gradient_accumulation": False, "max_norm": 0.0})

    def pretending(module: nn.Module, cell: Any, device: torch.device, rate: float) -> Any:
        engine = prepare(module, cell, device, learning_rate=rate)
        step = engine.step
        engine.step = lambda: (step(), 1.0)[1]  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(plugins, "GeminiPlugin", forgetful)
    lie(monkeypatch, "gemini", pretending)
    parts = run(root, "gemini", precision="bf16-master", micro_batch=micro_batch)
    assert "micro-steps" in refuted(parts)
    assert check(parts[0], "gradient norm").state == "shown"  # the norm alone would not tell


def test_weights_that_stand_still_are_invalid_whatever_the_norm_says(root, monkeypatch):
    class Lazy(ReplicatedEngine):
        def step(self) -> Any:
            self._optimizer.param_groups[0]["lr"] = 1e-9
            return super().step()

    lie(monkeypatch, "naive", lambda module, cell, _, rate: Lazy(module, cell, learning_rate=rate))
    parts = run(root, "naive", ranks=1)
    assert refuted(parts) == {"moved"}
    assert check(parts[0], "gradient norm").state == "shown"


def test_missing_masters_are_invalid(root, monkeypatch):
    class Pure(ReplicatedEngine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._masters = None

    def prepare(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> ReplicatedEngine:
        from tests.trials import cell_from_json

        pure = cell_from_json({"stage": "sft", "model": cell.model, "strategy": "naive", "device": "cpu", "precision": "bf16-pure"})
        return ReplicatedEngine(place(module, "bf16-pure", device), pure, learning_rate=learning_rate)

    lie(monkeypatch, "naive", prepare)
    assert refuted(run(root, "naive", ranks=1, precision="bf16-master")) == {"optimizer"}


# ----------------------------------------------------------------------------------------------- models in slices and runs of layers

BOTH = {"tensor_parallel": 2, "pipeline_parallel": 2}
SPLITS = [("bloom-tiny", {"tensor_parallel": 2}, 2), ("bloom-tiny", {"pipeline_parallel": 2}, 2), ("llama-tiny", BOTH, 4)]
IN_PARTS = {"trainable", "parameters", "gradients", "optimizer"}


@pytest.mark.parametrize(("model", "split", "ranks"), SPLITS)
def test_a_split_model_shows_that_each_rank_holds_its_part(root, model, split, ranks):
    for part in run(root, "hybrid", ranks=ranks, model=model, precision="bf16-master", **split):
        assert part.outcome == "ok", part.reason
        assert {check(part, what).state for what in IN_PARTS | {"exchanged"}} == {"shown"}
        assert check(part, "parameters").seen == check(part, "parameters").expected


def test_data_parallel_groups_of_split_models_add_up_all_gradients_of_their_part(root):
    for part in run(root, "hybrid", ranks=4, tensor_parallel=2):
        assert part.outcome == "ok", part.reason
        assert check(part, "reduced").state == "shown"
        assert check(part, "reduced").expected == 4 * check(part, "trainable").expected


def test_slices_that_cut_nothing_are_invalid(root, monkeypatch):
    lie(monkeypatch, "hybrid", replicated)
    assert refuted(run(root, "hybrid", tensor_parallel=2)) == {*IN_PARTS, "exchanged"}


def test_a_pipeline_whose_stages_all_hold_everything_is_invalid(root, monkeypatch):
    class Everything(ReplicatedEngine, PipelinedEngine):
        """Each rank runs the whole model over all micro-batches."""

        backward = PipelinedEngine.backward

        def run(self, inputs: dict[str, Any], rows: int, losses: Any, *, values: int = 1) -> torch.Tensor:
            total = torch.zeros(values)
            for index in range(len(inputs["input_ids"]) // rows):
                mine = slice(index * rows, (index + 1) * rows)
                some = {name: value[mine] if torch.is_tensor(value) else value for name, value in inputs.items()}
                found = losses(self.module(**some), index)
                if torch.is_grad_enabled():
                    found[0].backward()
                total += found.detach()
            dist.all_reduce(total)
            return total / 2

    def prepare(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> ReplicatedEngine:
        return Everything(place(module, cell.settings.precision, device), cell, learning_rate=learning_rate)

    lie(monkeypatch, "hybrid", prepare)
    assert refuted(run(root, "hybrid", pipeline_parallel=2)) >= IN_PARTS


def test_a_pipeline_that_keeps_the_whole_frozen_base_on_every_stage_is_invalid(root, monkeypatch):
    """ColossalAI lets go of the layers of other stages; here they stay, beside adapters that are where they belong."""
    hybrid = all_strategies()["hybrid"]
    real = hybrid.prepare

    def hoarding(module: nn.Module, cell: Any, device: torch.device, learning_rate: float) -> Any:
        spare = nn.ParameterList([nn.Parameter(one.detach().clone(), requires_grad=False) for one in module.parameters()])
        engine = real(module, cell, device, learning_rate=learning_rate)
        engine.module.spare = spare
        return engine

    lie(monkeypatch, "hybrid", hoarding)
    assert refuted(run(root, "hybrid", pipeline_parallel=2, lora_rank=4)) == {"frozen"}


def test_a_small_base_that_was_never_packed_is_invalid(root, monkeypatch):
    lie(monkeypatch, "naive", replicated)
    assert refuted(run(root, "naive", ranks=1, lora_rank=4, base_weights="nf4")) == {"frozen"}


# ------------------------------------------------------------------------------------------------------- a strategy from outside


class SlicedEngine(DdpEngine):
    """DDP, but each rank updates a slice of one flat copy of the parameters and they are put together afterwards."""

    def __init__(self, module: nn.Module, cell: Any, device: torch.device, *, learning_rate: float) -> None:
        super().__init__(module, cell, device, learning_rate=learning_rate)
        self._all = trainable(module)
        size = sum(parameter.numel() for parameter in self._all)
        self._size, self._slice = size, slice(dist.get_rank() * -(-size // 2), (dist.get_rank() + 1) * -(-size // 2))
        self._own = self._flat(self._all)[self._slice].clone()
        self._optimizer = torch.optim.AdamW([self._own], lr=learning_rate)

    def _flat(self, tensors: list[Any]) -> torch.Tensor:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        return nn.functional.pad(flat, (0, -self._size % 2))

    def step(self) -> Any:
        gradient = self._flat([parameter.grad for parameter in self._all])
        self._own.grad = gradient[self._slice].clone()
        self._optimizer.step()
        self._own.grad = None
        slices = [torch.empty_like(self._own) for _ in range(2)]
        dist.all_gather(slices, self._own.detach())
        whole = torch.cat(slices)
        for parameter, values in zip(self._all, whole[: self._size].split([p.numel() for p in self._all]), strict=True):
            parameter.data.copy_(values.view_as(parameter))
            parameter.grad = None
        return gradient.norm()


class Sliced(Strategy):
    """Known to nobody but this file."""

    precisions = frozenset({"fp32"})
    sharded = frozenset({"optimizer"})

    def start(self, cell: Any, device: torch.device) -> None:
        """Nothing to set up."""

    def prepare(self, module: nn.Module, cell: Any, device: torch.device, *, learning_rate: float) -> Any:
        return SlicedEngine(module, cell, device, learning_rate=learning_rate)


def test_a_strategy_of_another_file_is_judged_by_what_its_class_declares(root, monkeypatch):
    mine = Sliced()
    mine.name = "sliced"  # type: ignore[misc]
    monkeypatch.setitem(all_strategies(), "sliced", mine)
    for part in run(root, "sliced"):
        assert part.outcome == "ok", part.reason
        assert {check(part, what).state for what in ("parameters", "gradients", "optimizer", "reduced", "gathered")} == {"shown"}
    monkeypatch.setattr(Sliced, "sharded", frozenset({"optimizer", "gradients"}))
    assert refuted(run(root, "sliced")) == {"gradients"}
    monkeypatch.setattr(Sliced, "sharded", frozenset())
    assert refuted(run(root, "sliced")) == {"optimizer"}
