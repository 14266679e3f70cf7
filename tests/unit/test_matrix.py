"""From a suite to cells, blocks, warm starts and reasons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.errors import SuiteError, UserError
from bench.matrix import Plan, expand, impossible, known_names, load_plan, make_plan, plan_to_json, save_plan
from bench.strategies.base import all_strategies
from bench.strategies.requirement import Requirement
from bench.suite import check_suite
from tests.trials import tiny_cell

ROOT = Path(__file__).parents[2]
STAGES = {"sft": {"steps": 10}, "rm": {"steps": 10}, "ppo": {"prompts_per_iteration": 16, "global_batch": 16}}


def plan_of(**changes: Any) -> Plan:
    content: dict[str, Any] = {
        "suite": "small",
        "axes": {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive", "ddp"]},
        "settings": {"device": "cpu", "launcher": "fork"},
        "stages": STAGES,
    }
    return expand(check_suite({**content, **changes}, "suite.yaml", known_names(), Path()), "suite.yaml")


def axes(**changes: Any) -> dict[str, Any]:
    return {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive", "ddp"], **changes}


def test_the_quick_start_is_42_cells_and_exactly_6_skipped() -> None:
    plan = make_plan(ROOT / "config" / "quickstart.yaml")
    golden = json.loads((ROOT / "tests" / "golden" / "quickstart_cells.json").read_text(encoding="utf-8"))
    seen = {
        kind: sorted([cell.stage, cell.strategy, cell.lora_rank, cell.nodes] for cell in cells)
        for kind, cells in (("cells", plan.cells.values()), ("skipped", [item.cell for item in plan.skipped]))
    }
    assert seen == golden
    assert (len(plan.cells), len(plan.skipped)) == (42, 6)


def test_naive_on_two_ranks_is_skipped_with_the_reason() -> None:
    plan = plan_of(axes=axes(nodes=[1, 2]))
    assert [(item.cell.strategy, item.cell.nodes) for item in plan.skipped] == [("naive", 2)]
    assert "one" in plan.skipped[0].reason


def test_a_batch_that_ranks_cannot_share_is_skipped_with_the_numbers() -> None:
    plan = plan_of(axes=axes(strategy=["ddp"], nodes=[1, 3]))
    assert [item.reason for item in plan.skipped] == ["global batch 8 is no multiple of micro_batch x ranks = 1 x 3 = 3"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"processes_per_node": 3}, "3 ranks are no multiple of tensor_parallel x pipeline_parallel = 2 x 1 = 2"),
        ({"processes_per_node": 6}, "global batch 8 is no multiple of micro_batch x data-parallel ranks = 1 x 3 = 3"),
        ({"processes_per_node": 4}, None),
    ],
)
def test_batches_divide_over_data_parallel_ranks(changes: dict[str, int], reason: str | None) -> None:
    cell = tiny_cell("sft", strategy="hybrid", tensor_parallel=2, global_batch=8, micro_batch=1, steps=1, **changes)
    assert impossible(cell) == reason


def test_a_block_holds_all_strategies_of_one_stage_and_shape_in_an_order_that_is_kept() -> None:
    plan = plan_of(axes=axes(stage=["sft", "rm"], lora_rank=[0, 8], nodes=[1, 2]), trials=2)
    assert len(plan.blocks) == 2 * 2 * 2
    block = plan.blocks[0]
    assert {plan.cells[cell_id].strategy for cell_id in block.cells} == {"naive", "ddp"}
    again = plan_of(axes=axes(stage=["sft", "rm"], lora_rank=[0, 8], nodes=[1, 2]), trials=2)
    assert [item.cells for item in again.blocks] == [item.cells for item in plan.blocks]
    orders = {tuple(plan.cells[cell_id].strategy for cell_id in item.cells) for item in plan.blocks if item.nodes == 1}
    assert len(orders) > 1, "blocks run in seeded orders that differ"


def test_shared_warm_starts_are_made_once_and_in_order() -> None:
    plan = plan_of(axes=axes(stage=["sft", "rm", "ppo"], lora_rank=[0, 8]))
    kinds = [warm.cell.stage if warm.cell else "tokenizer" for warm in plan.warm]
    assert kinds == ["tokenizer", "sft", "rm"]
    rm = plan.warm[2]
    assert rm.starts["policy"] == plan.warm[1].key
    ppo = next(block for block in plan.blocks if block.stage == "ppo")
    assert {tuple(sorted(roles)) for roles in ppo.starts.values()} == {("policy", "reward", "tokenizer")}


def test_a_chain_continues_the_same_cell_and_waits_for_its_block() -> None:
    plan = plan_of(axes=axes(stage=["sft", "rm", "ppo"]), settings={"device": "cpu", "launcher": "fork", "warm_start": "chain"})
    sft, rm, ppo = plan.blocks
    assert ppo.after == tuple(sorted([sft.block_id, rm.block_id]))
    assert set(sft.saves) == set(sft.cells)
    assert not ppo.saves
    for cell_id, roles in rm.starts.items():
        assert plan.cells[roles["policy"].removeprefix("cell:")].strategy == plan.cells[cell_id].strategy


def test_a_chain_without_its_first_stage_is_a_mistake() -> None:
    with pytest.raises(SuiteError, match="continues the sft cell of the same axes, which is not in the matrix"):
        plan_of(axes=axes(stage=["rm"]), settings={"device": "cpu", "launcher": "fork", "warm_start": "chain"})


def test_an_untrained_reward_head_needs_no_reward_model() -> None:
    stages = {**STAGES, "ppo": {**STAGES["ppo"], "reward_model": "fresh-head"}}
    plan = plan_of(axes=axes(stage=["ppo"]), stages=stages)
    assert [warm.cell.stage if warm.cell else "tokenizer" for warm in plan.warm] == ["tokenizer", "sft"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stages": {"sft": {}}}, "exactly one of steps and epochs"),
        ({"stages": {"sft": {"steps": 1, "epochs": 1}}}, "exactly one of steps and epochs"),
        ({"settings": {"device": "cuda", "launcher": "fork"}}, "launcher: fork is for device: cpu"),
        ({"axes": {"stage": ["ppo"], "model": ["bloom-tiny"], "strategy": ["ddp"]},
          "stages": {**STAGES, "ppo": {"prompts_per_iteration": 3}}},
         "prompts_per_iteration is a multiple"),
        ({"axes": {"stage": ["ppo"], "model": ["bloom-tiny"], "strategy": ["ddp"]}, "stages": {**STAGES, "ppo": {"ptx_coef": 0.1}}},
         "ptx and ptx_coef go together"),
        ({"axes": {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive"], "nodes": [2]}}, "no cell of this matrix can run"),
        ({"include": [{"stage": "sft", "model": "bloom-tiny", "strategy": "naive", "nodes": 2}]}, "this cell cannot run"),
        ({"exclude": [{"stage": "sft"}]}, "all are excluded"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_mistakes(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SuiteError, match=problem):
        plan_of(**changes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "foreach"), ({"device": "cuda"}, "foreach"), ({"device": "cpu"}, "adamw"), ({"optimizer": "adamw"}, "adamw")],
)
def test_a_suite_that_names_no_optimizer_gets_torchs_own_choice_for_the_device(settings: dict[str, Any], expected: str) -> None:
    cells = plan_of(settings=settings).cells.values()
    assert {cell.settings.optimizer for cell in cells} == {expected}


def test_an_included_cell_whose_strategy_is_not_installed_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_strategies()["deepspeed_zero2"], "requires", (Requirement("no-such-package", "1", extra="deepspeed"),))
    plan = plan_of(include=[{"stage": "sft", "model": "bloom-tiny", "strategy": "deepspeed_zero2"}])
    assert [(it.cell.strategy, it.reason) for it in plan.skipped] == [
        ("deepspeed_zero2", "deepspeed_zero2: no-such-package is not installed; `make install-deepspeed` would be right")
    ]


def test_include_adds_and_exclude_removes_cells() -> None:
    plan = plan_of(
        exclude=[{"strategy": ["ddp"]}],
        include=[{"stage": "sft", "model": "bloom-tiny", "strategy": "zero2", "settings": {"steps": 3}}],
    )
    assert sorted((cell.strategy, cell.settings.steps) for cell in plan.cells.values()) == [("naive", 10), ("zero2", 3)]


def test_a_changed_field_changes_only_the_cells_that_it_concerns() -> None:
    stages = {**STAGES, "rm": {"steps": 11}}
    before, after = plan_of(axes=axes(stage=["sft", "rm"])), plan_of(axes=axes(stage=["sft", "rm"]), stages=stages)
    kept = set(before.cells) & set(after.cells)
    assert {before.cells[cell_id].stage for cell_id in kept} == {"sft"}


def test_a_plan_survives_the_round_trip_through_its_file(tmp_path: Path) -> None:
    plan = plan_of(axes=axes(stage=["sft", "rm", "ppo"], nodes=[1, 2]))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    before = (tmp_path / "plan.json").stat().st_mtime_ns
    save_plan(plan, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_mtime_ns == before


def test_ten_thousand_cells_are_planned_without_torch_in_little_memory(tmp_path: Path) -> None:
    """The issue's limits are 10 s and 500 MB; the memory is asserted here, the time is shown by benchmarks/plan.py."""
    suite = tmp_path / "big.yaml"
    ranks, nodes = list(range(125)), list(range(1, 21))
    suite.write_text(
        "suite: big\naxes: {stage: [sft], model: [bloom-tiny], strategy: [ddp, zero2], processes_per_node: [1, 2], "
        f"lora_rank: {ranks}, nodes: {nodes}}}\n"
        "settings: {device: cpu, launcher: fork, scaling: weak}\nstages: {sft: {steps: 10}}\n",
        encoding="utf-8",
    )
    program = (
        "import re, sys\nfrom pathlib import Path\nfrom bench.matrix import make_plan, plan_to_json\n"
        "plan = make_plan(Path(sys.argv[1])); plan_to_json(plan)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text()).group(1)\n"  # ru_maxrss counts what forked us, too
        "print(len(plan.cells), peak, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(suite)], capture_output=True, text=True, check=True, cwd=ROOT)
    cells, kilobytes, torch_loaded = done.stdout.split()
    assert (int(cells), torch_loaded) == (10_000, "False")
    assert int(kilobytes) < 500_000


def test_a_tokenizer_larger_than_the_model_s_vocabulary_is_refused_where_it_is_named_all_at_once() -> None:
    with pytest.raises(SuiteError) as caught:
        plan_of(
            axes=axes(stage=["sft", "rm"], model=["bloom-tiny", "bloom-560m"]),
            settings={"device": "cpu", "launcher": "fork", "tokenizer_vocabulary": 5000},
            stages={**STAGES, "rm": {"steps": 10, "tokenizer_vocabulary": 4097}},
            overrides=[{"when": {"stage": "sft", "strategy": "ddp"}, "settings": {"tokenizer_vocabulary": 6000}}],
            include=[{"stage": "sft", "model": "gpt2-tiny", "strategy": "ddp", "settings": {"tokenizer_vocabulary": 7000}}],
        )
    assert [(mistake.path, mistake.problem, mistake.value) for mistake in caught.value.mistakes] == [
        ("include[0].settings.tokenizer_vocabulary", "more tokens than the 4096 embeddings of gpt2-tiny; 4096 or less", 7000),
        ("overrides[0].settings.tokenizer_vocabulary", "more tokens than the 4096 embeddings of bloom-tiny; 4096 or less", 6000),
        ("settings.tokenizer_vocabulary", "more tokens than the 4096 embeddings of bloom-tiny; 4096 or less", 5000),
        ("stages.rm.tokenizer_vocabulary", "more tokens than the 4096 embeddings of bloom-tiny; 4096 or less", 4097),
    ]


def test_without_a_named_size_the_tokenizer_fits_every_model_and_cells_keep_their_ids() -> None:
    plan = plan_of(axes=axes(model=["bloom-tiny", "bloom-560m"]))
    sizes = {warm.tokenizer["vocabulary"] for warm in plan.warm if warm.tokenizer}
    assert sizes == {4096, 8192}
    assert {cell.settings.tokenizer_vocabulary for cell in plan.cells.values()} == {8192}


def test_a_pretrained_model_brings_its_own_tokenizer_so_no_size_is_refused() -> None:
    plan_of(settings={"device": "cpu", "launcher": "fork", "weights": "/somewhere", "tokenizer_vocabulary": 9999})


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000], ids=["cut", "empty", "no text", "deep"])
def test_a_damaged_plan_is_told_in_one_line_and_written_anew(tmp_path: Path, content: bytes) -> None:
    plan, path = plan_of(), tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a plan: .*`coati-bench plan SUITE --write` makes it anew$"):
        load_plan(path)
    save_plan(plan, path)
    assert load_plan(path) == plan


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plan: plan.update(cells=[]), "at cells: "),
        (lambda plan: plan.update(cells={}), "blocks.sft-bloom-tiny-1x1-trial0.cells: 'sft-.*' is not in the plan"),
        (lambda plan: plan.update(suite=3), "at suite: "),
        (lambda plan: plan.update(schema="coati-bench/plan/9"), "at schema: .*coati-bench/plan/1"),
        (lambda plan: plan.update(data=[]), "'synthetic-instruct' is not in the plan"),
        (lambda plan: plan.update(warm=[]), "'tokenizer-.*' is not in the plan"),
        (lambda plan: plan["warm"][0].update(tokenizer=None), "exactly one of tokenizer and cell"),
        (lambda plan: plan["limits"].update(timeout_seconds=-1), "at limits.timeout_seconds: .*greater than 0; seen: '-1'"),
        (lambda plan: plan["limits"].update(wrong=1), "at limits.wrong: "),
        (lambda plan: plan["blocks"][0].update(starts=[]), "at blocks.0.starts: "),
        (lambda plan: plan["blocks"][0].update(trial="0"), "at blocks.0.trial: "),
        (lambda plan: plan["blocks"][0].update(after=["none"]), "after: 'none' is not in the plan"),
        (lambda plan: plan["blocks"][0].update(saves=["none"]), "saves: 'none' is not in the plan"),
        (lambda plan: next(iter(plan["cells"].values())).update(strategy="x"), "at cells.sft-.*: unknown strategy; seen: 'x'; one of"),
        (lambda plan: next(iter(plan["cells"].values())).update(stage=[]), "unknown stage"),
        (lambda plan: next(iter(plan["cells"].values())).update(launcher="x"), "at launcher: .*seen: 'x'"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_told_in_one_line(tmp_path: Path, change: Callable[[Any], None], told: str) -> None:
    content = json.loads(json.dumps(plan_to_json(plan_of())))
    change(content)
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=told) as caught:
        load_plan(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("`coati-bench plan SUITE --write` makes it anew")


def test_more_trials_than_a_plan_can_hold_are_refused_before_blocks_are_made() -> None:
    with pytest.raises(SuiteError, match="trials: 2,000,000 trials of 2 cells; a plan has at most 1,000,000; seen: 1000000"):
        plan_of(trials=1_000_000)


def test_a_container_whose_name_is_too_long_for_a_suite_is_refused() -> None:
    with pytest.raises(UserError, match="a suite's name has at most 64 letters; seen: 214"):
        make_plan(ROOT / "config" / "quickstart.yaml", container="a" * 200)
