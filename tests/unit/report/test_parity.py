from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.record import Input
from bench.report.inventory import Row
from bench.report.metrics import Trial
from bench.report.parity import Parity, comparison_key, judge
from tests.unit.report.trial_factory import make_cell, make_record, make_row, sha


def with_losses(row: Row, losses: list[float], **facts: Any) -> Row:
    part = row.record.parts[0]
    part = dataclasses.replace(part, series={**part.series, "loss": losses}, facts={**part.facts, **facts})
    return Row(dataclasses.replace(row.record, parts=[part, *row.record.parts[1:]]), row.cell, row.file)


def pair(mine: list[float], naive: list[float], precision: str = "fp32", naive_precision: str | None = None, stage: str = "sft") -> Parity:
    """The verdict on zero2 with these losses against naive with those."""
    baseline = with_losses(make_row(make_cell(stage, precision=naive_precision or precision)), naive)
    row = with_losses(make_row(make_cell(stage, "zero2", precision=precision)), mine)
    return judge([baseline, row])[row.file]


FLAT = [2.0] * 30


def test_equal_losses_agree() -> None:
    verdict = pair(FLAT, FLAT)
    assert (verdict.state, verdict.first, verdict.curve, verdict.steps) == ("agrees", 0.0, 0.0, 30)


def test_fp32_first_loss_may_deviate_by_1e_5() -> None:
    assert pair([2.0 * (1 + 0.9e-5), *FLAT[1:]], FLAT).state == "agrees"
    verdict = pair([2.0 * (1 + 1.2e-5), *FLAT[1:]], FLAT)
    assert verdict.state == "struck"
    assert verdict.reason == "first loss deviates by 1.2e-05; allowed 1e-05"


def test_fp32_curve_may_deviate_by_1e_4() -> None:
    assert pair([*FLAT[:20], 2.0 * (1 + 0.9e-4), *FLAT[21:]], FLAT).state == "agrees"
    verdict = pair([*FLAT[:20], 2.0 * (1 + 1.3e-4), *FLAT[21:]], FLAT)
    assert verdict.reason == "curve deviates by 1.3e-04 at step 20; allowed 1e-04"


def test_16_bits_compare_a_short_curve_in_a_wider_band() -> None:
    apart = [2.0 * 1.015, *[2.0] * 9, *[4.0] * 20]
    verdict = pair(apart, FLAT, "bf16-master")
    assert (verdict.state, verdict.steps) == ("agrees", 10)
    assert pair([2.0 * 1.03, *FLAT[1:]], FLAT, "bf16-master").state == "struck"


def test_16_bits_compare_the_mean_of_ten_steps_since_rounding_is_amplified() -> None:
    swinging = [2.0, *[2.4, 1.6] * 4, 2.0, *[2.0] * 20]
    assert pair(swinging, FLAT, "bf16-master").state == "agrees"
    verdict = pair([2.0, *[2.12] * 9, *FLAT[10:]], FLAT, "bf16-master")
    assert verdict.reason == "mean of 10 steps deviates by 5.4e-02; allowed 5e-02"


def test_a_strategy_that_stopped_learning_is_struck_in_16_bits() -> None:
    falling = [2.0 - 0.05 * step for step in range(30)]
    assert pair(FLAT, falling, "bf16-master").state == "struck"


def test_equal_losses_of_nothing_are_no_agreement() -> None:
    rows = []
    for name in ("naive", "zero2"):
        row = with_losses(make_row(make_cell("sft", name)), [0.0] * 30)
        laps = [dataclasses.replace(lap, counts={**lap.counts, "loss_tokens": 0}) for lap in row.record.parts[0].laps]
        record = dataclasses.replace(row.record, parts=[dataclasses.replace(row.record.parts[0], laps=laps)])
        rows.append(Row(record, row.cell, row.file))
    verdicts = judge(rows)
    assert {verdict.text for verdict in verdicts.values()} == {"struck: no token carried loss, so nothing was trained"}
    trial = Trial(rows[0])
    for name in ("loss_tokens_per_second", "first_loss", "final_loss"):
        assert trial.values[name].number is None


def test_16_bits_fall_back_on_naive_in_fp32_and_say_so() -> None:
    verdict = pair([2.02, *FLAT[1:]], FLAT, "bf16-master", "fp32")
    assert (verdict.state, verdict.partner_precision) == ("agrees", "fp32")


def test_naive_in_the_same_precision_is_preferred() -> None:
    rows = [with_losses(make_row(make_cell("sft", precision=precision)), FLAT) for precision in ("fp32", "bf16-master")]
    mine = with_losses(make_row(make_cell("sft", "zero2", precision="bf16-master")), FLAT)
    assert judge([*rows, mine])[mine.file].partner_precision == "bf16-master"


def test_fp32_is_never_compared_with_16_bits() -> None:
    verdict = pair(FLAT, FLAT, "fp32", "bf16-master")
    assert verdict == Parity(state="no partner", reason="no ok trial of naive with this seed in fp32")


def test_the_precision_in_force_counts() -> None:
    baseline = with_losses(make_row(make_cell("sft")), FLAT)
    forced = with_losses(make_row(make_cell("sft", "gemini")), [2.01, *FLAT[1:]], precision="bf16-pure")
    assert judge([baseline, forced])[forced.file].state == "agrees"


def test_a_shorter_curve_is_struck() -> None:
    assert pair(FLAT[:29], FLAT).reason == "29 steps against naive's 30"


def test_other_initial_weights_are_struck() -> None:
    baseline = with_losses(make_row(make_cell("sft")), FLAT)
    row = with_losses(make_row(make_cell("sft", "ddp")), FLAT, initial_weights_sha256=sha("others"))
    assert judge([baseline, row])[row.file].reason == "initial weights differ from naive's (sha256)"


def test_another_warm_start_is_no_partner() -> None:
    baseline, row = make_row(make_cell("rm", warm_start="chain")), make_row(make_cell("rm", "ddp", warm_start="chain"))
    others = [dataclasses.replace(item, sha256=sha("own")) if item.name == "policy" else item for item in row.record.inputs]
    row = Row(dataclasses.replace(row.record, inputs=others), row.cell, row.file)
    verdict = judge([baseline, row])[row.file]
    assert (verdict.state, verdict.reason) == ("no partner", "other policy than naive's: a chain continues each cell's own weights")


def test_other_data_is_no_partner() -> None:
    baseline, row = make_row(make_cell("sft")), make_row(make_cell("sft", "ddp"))
    others = [Input(name="synthetic-instruct", path="", sha256=sha("other")), *row.record.inputs[1:]]
    row = Row(dataclasses.replace(row.record, inputs=others), row.cell, row.file)
    assert judge([baseline, row])[row.file].state == "no partner"


def test_trials_pair_by_seed() -> None:
    rows = [make_row(make_cell("sft"), 0), make_row(make_cell("sft", "ddp"), 1)]
    assert judge(rows)[rows[1].file].state == "no partner"


def test_trials_that_are_not_ok_are_not_judged() -> None:
    failed = make_row(make_cell("sft", "ddp"), outcome="diverged", reason="nan")
    assert judge([make_row(make_cell("sft")), failed]).keys() == {f"{make_cell('sft').cell_id}/0.json"}


def test_naive_at_one_rank_is_the_partner_at_many_ranks() -> None:
    rows = [make_row(make_cell("sft")), make_row(make_cell("sft", "ddp", nodes=2))]
    assert judge(rows)[rows[1].file].state == "agrees"


def test_weak_scaling_pairs_with_naive_of_as_large_a_step() -> None:
    large = make_cell("sft", "ddp", nodes=2, scaling="weak")
    assert comparison_key(large) == comparison_key(make_cell("sft", global_batch=16))
    assert comparison_key(large) != comparison_key(make_cell("sft"))
    ppo = make_cell("ppo", "ddp", nodes=2, scaling="weak")
    assert comparison_key(ppo) == comparison_key(make_cell("ppo", global_batch=16, prompts_per_iteration=64))


@pytest.mark.parametrize("setting", [{"launcher": "fork"}, {"micro_batch": 4}, {"activation_checkpointing": True}])
def test_settings_that_leave_the_loss_alone_may_differ(setting: dict[str, Any]) -> None:
    rows = [make_row(make_cell("sft")), make_row(make_cell("sft", "ddp", **setting))]
    assert judge(rows)[rows[1].file].state == "agrees"


@pytest.mark.parametrize("setting", [{"learning_rate": 1e-4}, {"lora_rank": 2}, {"clip_norm": None}, {"model": "bloom-560m"}])
def test_settings_that_change_the_loss_may_not(setting: dict[str, Any]) -> None:
    rows = [make_row(make_cell("sft")), make_row(make_cell("sft", "ddp", **setting))]
    assert judge(rows)[rows[1].file].state == "no partner"


def test_ppo_is_judged_by_its_first_iteration_and_on_the_scale_of_advantages() -> None:
    """8 losses, 4 iterations: 2 steps count; a deviation near 0 is no large one."""
    naive = [1e-8, 0.01, *[0.5] * 6]
    assert pair([9e-6, 0.01, *[0.9] * 6], naive, stage="ppo").state == "agrees"
    assert pair([1e-8, 0.011, *[0.5] * 6], naive, stage="ppo").state == "struck"


@pytest.mark.parametrize(("precision", "near", "far"), [("fp32", 5e-4, 2e-3), ("bf16-master", 0.08, 0.15)])
@pytest.mark.parametrize("name", ["value_loss", "gradient_norm", "critic_gradient_norm", "reward"])
def test_of_ppo_what_the_loss_does_not_show_must_agree_too(name: str, precision: str, near: float, far: float) -> None:
    """The ptx loss outweighs the policy's, and the critic's is in neither: equal losses alone say little."""

    def first(strategy: str, value: float) -> Row:
        row = make_row(make_cell("ppo", strategy, precision=precision))
        part = row.record.parts[0]
        part = dataclasses.replace(part, series=part.series | {name: [value, *[3.0] * 7]})
        return Row(dataclasses.replace(row.record, parts=[part]), row.cell, f"{strategy}{value}")

    for gap, state in ((0.0, "agrees"), (near, "agrees"), (far, "struck")):
        mine, naive = first("zero2", 2.0 * (1 + gap)), first("naive", 2.0)
        verdict = judge([mine, naive])[mine.file]
        assert verdict.state == state, verdict
        assert state == "agrees" or verdict.reason.startswith(f"first {name.replace('_', ' ')} deviates by")


def halves(**first: float) -> dict[str, str]:
    """Verdicts of strategies in bf16 with these first losses; naive has 2.0."""
    rows = {
        name: with_losses(make_row(make_cell("sft", name, precision="bf16-master")), [value, *FLAT[1:]])
        for name, value in {"naive": 2.0, **first}.items()
    }
    found = judge(rows.values())
    return {name: found[row.file].state for name, row in rows.items() if name != "naive"}


def test_strategies_in_one_16_bit_mode_agree_with_each_other_to_1e_3() -> None:
    assert halves(ddp=2.01, zero2=2.011) == {"ddp": "agrees", "zero2": "agrees"}


def test_the_odd_one_out_is_struck() -> None:
    assert halves(ddp=2.01, zero2=2.011, gemini=2.03) == {"ddp": "agrees", "zero2": "agrees", "gemini": "struck"}


def test_two_that_disagree_are_both_struck() -> None:
    assert halves(ddp=2.0, zero2=2.03) == {"ddp": "struck", "zero2": "struck"}


def test_one_strategy_alone_has_no_peers_to_disagree_with() -> None:
    assert halves(ddp=2.03) == {"ddp": "agrees"}


def alone(precision: str = "bf16-master", **losses: list[float]) -> dict[str, Parity]:
    """Verdicts of strategies with these losses where naive has no trial."""
    rows = {name: with_losses(make_row(make_cell("sft", name, precision=precision)), values) for name, values in losses.items()}
    found = judge(rows.values())
    return {name: found[row.file] for name, row in rows.items()}


def test_without_naive_the_strategies_stand_in_for_it() -> None:
    found = alone(ddp=FLAT, zero2=[2.001, *FLAT[1:]], fsdp=FLAT)
    assert {verdict.state for verdict in found.values()} == {"peers agree"}
    assert found["ddp"].largest == pytest.approx(0.001 / 2.001)
    assert found["ddp"].reason == "no ok trial of naive with this seed in bf16-master or fp32"
    assert found["ddp"].partner is None


def test_without_naive_the_odd_one_out_is_struck() -> None:
    found = alone(ddp=FLAT, zero2=FLAT, fsdp=[2.003, *FLAT[1:]])
    assert {name: verdict.state for name, verdict in found.items()} == {"ddp": "peers agree", "zero2": "peers agree", "fsdp": "struck"}
    assert found["fsdp"].reason == (
        "no naive to compare with, and other losses than 2 of 2 other strategies' trials: first loss deviates by 1.5e-03; allowed 1e-03"
    )
    assert found["ddp"].largest == 0.0


def test_without_naive_two_that_disagree_are_both_struck() -> None:
    stopped = {name: verdict.text for name, verdict in alone(ddp=[2.0, *[1.0] * 29], zero2=FLAT).items()}
    why = "struck: no naive to compare with, and other losses than the only other strategy"
    assert stopped == {
        "ddp": f"{why}: mean of 10 steps deviates by 4.5e-01; allowed 5e-02",
        "zero2": f"{why}: mean of 10 steps deviates by 8.2e-01; allowed 5e-02",
    }


def test_without_naive_fp32_is_held_to_its_own_tolerance() -> None:
    assert {verdict.state for verdict in alone("fp32", ddp=FLAT, zero2=[2.0 * (1 + 0.9e-5), *FLAT[1:]]).values()} == {"peers agree"}
    assert {verdict.state for verdict in alone("fp32", ddp=FLAT, zero2=[2.0 * (1 + 1.2e-5), *FLAT[1:]]).values()} == {"struck"}


def test_one_strategy_without_naive_has_no_partner() -> None:
    assert alone(ddp=FLAT)["ddp"].state == "no partner"


def test_without_naive_other_initial_weights_are_struck() -> None:
    rows = [make_row(make_cell("sft", "ddp")), with_losses(make_row(make_cell("sft", "zero2")), FLAT, initial_weights_sha256=sha("others"))]
    assert judge(rows)[rows[1].file].reason.endswith("the only other strategy: initial weights differ from ddp's (sha256)")


def test_chains_without_naive_are_not_compared_with_each_other() -> None:
    rows = [make_row(make_cell("rm", name, warm_start="chain")) for name in ("ddp", "zero2")]
    others = [dataclasses.replace(item, sha256=sha("own")) if item.name == "policy" else item for item in rows[1].record.inputs]
    rows[1] = Row(dataclasses.replace(rows[1].record, inputs=others), rows[1].cell, rows[1].file)
    assert {verdict.state for verdict in judge(rows).values()} == {"no partner"}


def test_a_naive_of_another_precision_leaves_the_strategies_to_each_other() -> None:
    modes = {"naive": "fp16-master", "ddp": "bf16-master", "zero2": "bf16-master"}
    rows = [make_row(make_cell("sft", name, precision=mode)) for name, mode in modes.items()]
    assert [judge(rows)[row.file].state for row in rows] == ["reference", "peers agree", "peers agree"]


def test_every_adamw_is_a_partner_and_the_same_one_is_preferred() -> None:
    other, same = make_row(make_cell("sft", optimizer="fused")), make_row(make_cell("sft", optimizer="foreach"))
    row = make_row(make_cell("sft", "ddp", optimizer="foreach"))
    assert judge([other, row])[row.file].partner == other.file
    assert judge([other, same, row])[row.file].partner == same.file


def test_a_chart_can_find_the_partner() -> None:
    rows = [make_row(make_cell("sft")), make_row(make_cell("sft", "ddp"))]
    assert judge(rows)[rows[1].file].partner == rows[0].file
    assert judge(rows)[rows[0].file] == Parity(state="reference")


def test_a_record_without_parts_is_not_judged() -> None:
    empty = make_record(make_cell("sft", "ddp"), ranks=range(0))
    assert judge([Row(empty, empty.parsed_cell, "x.json")]) == {}


def test_the_largest_deviation_is_the_first_loss_s_where_that_is_larger() -> None:
    assert Parity(state="agrees", first=1e-2, curve=3e-3).largest == 1e-2
    assert Parity(state="agrees", first=1e-3, curve=3e-3).largest == 3e-3
    assert Parity(state="no partner").largest is None
