"""Every check is shown, refuted or not applicable for a stated reason; expectations follow from the declaration alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.measure.evidence.judge import Declared, Seen, Share, judge
from bench.measure.evidence.trace import tensor_bytes
from bench.measure.evidence.walk import Amount
from bench.measure.evidence.watch import learning_rates
from bench.record import Traffic

P = 1_000_000


def in_bytes(size: float, element: int = 4) -> Amount:
    return Amount(int(size), int(size / element))


def seen(**changes: Any) -> Seen:
    """A whole model in fp32 that did everything right on one of four ranks."""
    good: dict[str, Any] = {
        "model": "policy", "trainable": P, "frozen": 0, "predicted": P, "live": P, "parameters": in_bytes(4 * P),
        "gradients": in_bytes(4 * P), "optimizer": in_bytes(8 * P), "collectives": {"all-reduce": Traffic(count=3, bytes=4 * P)},
        "norms": [1.0, 0.5], "moved": 0.4, "changed": Share(some=9, of=9), "agreement": Share(some=9, of=9),
    }  # fmt: skip
    return Seen(**{**good, **changes})


DDP = Declared(data_parallel=4)
ZERO1, ZERO2 = (dataclasses.replace(DDP, sharded=frozenset(what)) for what in ({"optimizer"}, {"optimizer", "gradients"}))
GEMINI = dataclasses.replace(DDP, sharded=frozenset({"optimizer", "gradients", "parameters"}), precision="bf16-master")


def states(found: Seen, declared: Declared = DDP) -> dict[str, str]:
    return {check.what: check.state for check in judge(found, declared)}


def refuted(found: Seen, declared: Declared = DDP) -> list[str]:
    return [check.what for check in judge(found, declared) if check.state == "refuted"]


def test_what_is_declared_and_seen_is_shown() -> None:
    assert refuted(seen()) == []
    assert states(seen())["reduced"] == "shown"
    assert states(seen())["gathered"] == "not applicable"


def test_a_whole_copy_where_shares_are_declared_is_refuted() -> None:
    traffic = {"reduce-scatter": Traffic(count=1, bytes=4 * P), "all-gather": Traffic(count=1, bytes=4 * P)}
    assert refuted(seen(collectives=traffic), ZERO1) == ["optimizer"]
    assert refuted(seen(collectives=traffic), ZERO2) == ["gradients", "optimizer"]
    shares = {"optimizer": in_bytes(2 * P), "gradients": in_bytes(P)}
    assert refuted(seen(collectives=traffic, **shares), ZERO2) == []
    half = dataclasses.replace(ZERO2, data_parallel=2)
    assert refuted(seen(collectives=traffic, gradients=in_bytes(2 * P), optimizer=in_bytes(8 * P)), half) == ["optimizer"]


@pytest.mark.parametrize(("factor", "state"), [(0.85, "refuted"), (0.95, "shown"), (1.33, "shown"), (1.5, "refuted")])
def test_the_tolerance_of_bytes_is_a_tenth_less_and_two_fifths_more(factor: float, state: str) -> None:
    assert states(seen(optimizer=in_bytes(8 * P * factor)))["optimizer"] == state


def test_gradients_may_be_of_any_type_but_not_of_any_number() -> None:
    gathered = {"all-gather": Traffic(count=2, bytes=2 * P), "reduce-scatter": Traffic(count=1, bytes=4 * P)}
    held = {"parameters": in_bytes(P / 2, 2), "optimizer": in_bytes(3 * P), "collectives": gathered}
    assert refuted(seen(gradients=in_bytes(P, 4), **held), GEMINI) == []
    assert refuted(seen(gradients=in_bytes(P / 2, 2), **held), GEMINI) == []
    assert refuted(seen(gradients=in_bytes(2 * P, 2), **held), GEMINI) == ["gradients"]
    assert states(seen(gradients=Amount(), **held), GEMINI)["gradients"] == "not applicable"


def test_a_pinned_copy_in_host_memory_is_no_second_share() -> None:
    both = Amount(8 * P, 2 * P, 8 * P, 2 * P)
    assert refuted(seen(optimizer=both), dataclasses.replace(DDP, on_gpu=True)) == []


def test_optimizer_states_lie_where_they_are_declared_to_lie() -> None:
    gpu, offloaded = (dataclasses.replace(DDP, on_gpu=True, offloaded=frozenset(what)) for what in (set(), {"optimizer"}))
    on_host = Amount(0, 0, 8 * P, 2 * P)
    assert refuted(seen(optimizer=on_host), gpu) == ["placement"]
    assert refuted(seen(optimizer=on_host), offloaded) == []
    assert refuted(seen(), offloaded) == ["placement"]
    assert "placement" not in states(seen())  # a CPU is its own host


def test_collectives_must_carry_the_gradients_and_the_shares() -> None:
    assert refuted(seen(collectives={})) == ["reduced"]
    assert refuted(seen(collectives={"all-reduce": Traffic(count=1, bytes=4)})) == ["reduced"]
    shares = {"optimizer": in_bytes(2 * P), "gradients": in_bytes(P)}
    assert refuted(seen(**shares), ZERO2) == ["gathered"]
    assert {states(seen(collectives=None))[what] for what in ("reduced", "gathered")} == {"not applicable"}


def test_one_rank_has_no_collectives() -> None:
    alone = states(seen(collectives={}, agreement=None), Declared())
    assert (alone["reduced"], alone["gathered"], alone["optimizer"]) == ("not applicable", "not applicable", "shown")


def test_a_model_split_over_ranks_is_in_parts() -> None:
    split = Declared(data_parallel=1, model_parallel=2)
    halves = {"parameters": in_bytes(2.2 * P), "gradients": in_bytes(2.2 * P), "optimizer": in_bytes(4.4 * P), "agreement": None}
    assert refuted(seen(live=600_000, **halves), split) == []
    assert refuted(seen(agreement=None), split) == ["parameters", "gradients", "optimizer"]
    assert refuted(seen(collectives={"all-reduce": Traffic(count=1, bytes=4)}, **halves), split) == ["exchanged"]


@pytest.mark.parametrize(
    ("part", "held", "found"),
    [
        (600_000, 600_000, []),
        (600_000, 560_000, ["trainable"]),
        (600_000, 700_000, ["trainable", "parameters", "gradients", "optimizer"]),
        (600_000, 500_000, ["trainable", "parameters", "gradients", "optimizer"]),
        (870_000, 1_000_000, ["trainable", "parameters", "gradients", "optimizer"]),
    ],
)
def test_a_rank_of_a_split_model_holds_its_part_within_a_tenth_and_counts_it_exactly(part: int, held: int, found: list[str]) -> None:
    split = Declared(data_parallel=1, model_parallel=2)
    amounts = {"parameters": in_bytes(4 * held), "gradients": in_bytes(4 * held), "optimizer": in_bytes(8 * held)}
    assert refuted(seen(part=part, live=held, agreement=None, **amounts), split) == found


@pytest.mark.parametrize("changes", [{"live": 0}, {"live": P + 1}, {"predicted": P // 2}, {"trainable": P + 1, "live": P}])
def test_a_count_that_is_not_the_predicted_one_is_refuted(changes: dict[str, int]) -> None:
    assert "trainable" in refuted(seen(**changes))


def test_a_model_of_unknown_architecture_has_no_predicted_count() -> None:
    assert states(seen(predicted=None))["trainable"] == "not applicable"


def test_frozen_weights_may_be_smaller_than_the_mode_says_but_not_larger() -> None:
    lora = {"frozen": 10 * P, "lora_rank": 8, "adapters": Share(some=4, of=4), "unmoved": Share(some=9, of=9)}
    assert refuted(seen(frozen_amount=in_bytes(10 * P, 1), **lora)) == []
    assert refuted(seen(frozen_amount=in_bytes(80 * P, 8), **lora)) == ["frozen"]
    assert refuted(seen(frozen_amount=in_bytes(40 * P), **lora), dataclasses.replace(DDP, sharded=frozenset({"frozen"}))) == ["frozen"]


def test_frozen_weights_that_are_whole_are_known_within_a_tenth() -> None:
    small = {"frozen": 10 * P, "frozen_bytes": 6 * P, "lora_rank": 8, "adapters": Share(some=4, of=4), "unmoved": Share(some=9, of=9)}
    assert refuted(seen(frozen_amount=in_bytes(6.5 * P, 1), **small)) == []
    assert refuted(seen(frozen_amount=in_bytes(6.7 * P, 1), **small)) == ["frozen"]
    halves = Declared(data_parallel=2, sharded=frozenset({"frozen"}))
    assert refuted(seen(frozen_amount=in_bytes(4.1 * P, 1), **small), halves) == []


def test_learning_that_did_not_happen_is_refuted() -> None:
    assert refuted(seen(norms=[0.0, 0.0])) == ["gradient norm"]
    assert refuted(seen(moved=1e-5)) == ["moved"]
    assert refuted(seen(changed=Share(some=0, of=9))) == ["moved"]
    assert refuted(seen(micro_steps=Share(some=2, of=9))) == ["micro-steps"]
    assert refuted(seen(agreement=Share(some=8, of=9))) == ["agreement"]
    lora = {"lora_rank": 8, "unmoved": Share(some=9, of=9), "frozen": 1}
    assert refuted(seen(adapters=Share(some=7, of=8), **lora)) == ["adapters"]
    assert refuted(seen(adapters=Share(some=8, of=8), **{**lora, "unmoved": Share(some=8, of=9)})) == ["unmoved"]


def test_steps_that_overflowed_fp16_are_no_evidence_either_way() -> None:
    fp16 = dataclasses.replace(DDP, precision="fp16-master")
    overflowed = seen(norms=[float("inf")] * 2, moved=None, parameters=in_bytes(2 * P, 2), optimizer=in_bytes(4 * P), collectives=None)
    assert {states(overflowed, fp16)[what] for what in ("gradient norm", "moved", "optimizer", "reduced")} == {"not applicable"}
    assert refuted(seen(norms=[float("inf")] * 2)) == ["gradient norm"]


def test_learning_rates_are_summed_over_steps_that_updated() -> None:
    largest = 3.4028234663852886e38
    series = {"learning_rate": [9.0, 1.0, 2.0, 4.0], "gradient_norm": [1.0, 1.0, largest, 1.0], "critic_learning_rate": [0.5] * 4}
    assert learning_rates(series, 1) == {"policy": 5.0, "reward": 5.0, "critic": 0.0, "model 1": 5.0}


def test_bytes_of_nested_lists_add_up() -> None:
    import torch

    assert tensor_bytes([[torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)], torch.zeros(1), "group"]) == 8 + 6 + 4
