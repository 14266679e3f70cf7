"""Tensors are found in whatever object holds them, counted once a storage, and told apart by their bits."""

from __future__ import annotations

import torch
from torch import nn

from bench.measure.evidence.holdings import Holdings
from bench.measure.evidence.walk import Amount, amount, digests, local, samples, state_tensors, storages, walk

CPU = torch.device("cpu")


class Odd:
    """Holds a tensor in each way that frameworks do."""

    def __init__(self) -> None:
        self.attribute = torch.zeros(1)
        self.nested = {"list": [torch.zeros(2)], "tuple": ((torch.zeros(3),),)}
        self.members = {torch.zeros(4)}
        self.again = self.attribute
        self.self = self
        self.closure = lambda: torch.zeros(99)


def sizes(root: object) -> list[int]:
    return sorted(tensor.numel() for slot in walk(root).slots if (tensor := slot.read()) is not None)


def test_a_walk_finds_every_tensor_once() -> None:
    assert sizes(Odd()) == [1, 2, 3, 4]


def test_a_slot_sees_what_was_put_in_its_place() -> None:
    odd = Odd()
    (slot,) = [slot for slot in walk(odd).slots if slot.key in ("attribute", "again")]
    slot.owner[slot.key] = torch.zeros(7)
    tensor = slot.read()
    assert tensor is not None
    assert tensor.numel() == 7
    del slot.owner[slot.key]
    assert slot.read() is None


def test_states_of_optimizers_are_apart_from_what_they_update() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    found = walk({"module": module, "optimizer": [optimizer]})
    assert found.optimizers == [optimizer]
    assert sizes({"module": module, "optimizer": [optimizer]}) == [2, 6]
    assert sorted(tensor.numel() for tensor in state_tensors(found.optimizers)) == [1, 1, 2, 2, 6, 6]


def test_a_storage_counts_once_and_as_a_whole() -> None:
    flat = torch.zeros(100)
    assert amount([flat[:10], flat[50:60], flat], CPU) == Amount(400, 100)
    assert amount([torch.zeros(8, dtype=torch.bfloat16)], CPU) == Amount(16, 8)
    assert amount([flat], torch.device("cuda")) == Amount(0, 0, 400, 100)


def test_what_was_released_takes_nothing() -> None:
    tensor = torch.zeros(10)
    tensor.untyped_storage().resize_(0)
    assert storages([tensor, torch.empty(3, device="meta")]) == {}


def test_digests_notice_one_bit_and_nothing_else() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for size in (1, 7, 64, 1001):
            tensor = torch.arange(size).to(dtype)
            before = digests([tensor, tensor.clone()])
            assert before[0] == before[1]
            tensor.view(torch.uint8)[-1] ^= 1
            assert digests([tensor]) != [before[0]]
    part = torch.arange(100, dtype=torch.bfloat16)[3:50]
    assert digests([part]) == digests([part.clone()])
    assert digests([torch.ones(4, 5).t()]) == digests([torch.ones(5, 4)])
    assert digests([]) == []
    assert digests([torch.zeros(0), torch.tensor(0.0)]) == [0, 0]


def test_samples_are_spread_evenly_and_are_copies() -> None:
    tensor = torch.arange(10_000.0)
    (sample,) = samples([tensor])
    tensor.zero_()
    assert len(sample) == 1024
    assert sample[-1] > 9_000


def test_a_subclass_of_tensor_is_read_without_its_hooks() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"{func} was intercepted")

    loud = torch.zeros(5).as_subclass(Loud)
    assert amount([local(loud)], CPU).elements == 5
    assert len(digests([local(loud)])) == 1


class Chunked:
    """An engine like Gemini's: parameters live in 16-bit shards with fp32 masters beside them, and are empty meanwhile."""

    def __init__(self) -> None:
        self.module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.module[1].requires_grad_(False)
        self.chunk = {torch.zeros(10, dtype=torch.bfloat16)}
        self.master = [torch.zeros(10)]
        self.counter = torch.zeros(1, dtype=torch.int32)
        for parameter in self.module[0].parameters():
            parameter.data = parameter.data.bfloat16()
            parameter.data.untyped_storage().resize_(0)

    def gradient_shares(self) -> None:
        return None


def test_shards_masters_and_frozen_parameters_are_told_apart() -> None:
    holdings = Holdings(Chunked(), "bf16-master", CPU)  # type: ignore[arg-type]
    assert holdings.parameters() == Amount(20, 10)
    assert holdings.optimizer() == Amount(40, 10)
    assert holdings.frozen() == Amount(32, 8)
    assert holdings.count_trainable() == 20
    assert not holdings.masters_are_parameters


def test_what_deepspeed_has_gathered_for_use_is_no_more_than_its_share() -> None:
    class Partitioned:
        module = nn.Linear(4, 4).bfloat16()

        def gradient_shares(self) -> None:
            return None

    for parameter in Partitioned.module.parameters():
        vars(parameter)["ds_tensor"] = parameter.data.reshape(-1)[: parameter.numel() // 2].clone()
    assert Holdings(Partitioned(), "bf16-master", CPU).parameters() == Amount(20, 10)  # type: ignore[arg-type]
    Partitioned.module.requires_grad_(False)
    assert Holdings(Partitioned(), "bf16-master", CPU).frozen() == Amount(20, 10)  # type: ignore[arg-type]


def test_scales_of_quantised_weights_are_no_masters() -> None:
    class Engine(Chunked):
        """Its frozen weights have fp32 scales beside them, as bitsandbytes keeps them."""

        def __init__(self) -> None:
            super().__init__()
            vars(self.module[1].weight)["SCB"] = torch.zeros(1000)
            vars(self.module[1].bias)["quant_state"] = Odd()

    assert Holdings(Engine(), "bf16-master", CPU).optimizer() == Amount(40, 10)  # type: ignore[arg-type]


def test_gradients_that_an_engine_keeps_for_itself_are_what_is_new() -> None:
    engine = Chunked()
    holdings = Holdings(engine, "bf16-master", CPU)  # type: ignore[arg-type]
    assert holdings.gradients() == Amount()
    engine.store = {"averaged": [torch.zeros(10, dtype=torch.bfloat16)]}  # type: ignore[attr-defined]
    assert holdings.gradients() == Amount(20, 10)


def test_parameters_in_fp32_are_their_own_masters_where_the_mode_has_masters() -> None:
    class Plain:
        module = nn.Linear(4, 4)

    for precision, own in (("bf16-master", True), ("fp32", False), ("bf16-autocast", False)):
        holdings = Holdings(Plain(), precision, CPU)  # type: ignore[arg-type]
        assert holdings.masters_are_parameters == own
        assert (holdings.parameters().elements, holdings.optimizer().elements) == ((0, 20) if own else (20, 0))


def test_a_tensor_that_somebody_left_behind_hides_no_weights_that_are_their_own_masters():
    """LLaMA's rotary embedding refers to its frequencies from a second place, which may have another copy."""

    class Engine:
        def __init__(self) -> None:
            self.module = nn.Linear(4, 2)
            self.module.left = torch.zeros(3)

    holdings = Holdings(Engine(), "bf16-master", CPU)  # type: ignore[arg-type]
    assert holdings.masters_are_parameters
    assert holdings.updated().keys() == {"weight", "bias"}
