from __future__ import annotations

import pytest
import torch

from bench.data.collate import (
    NO_LOSS,
    PROMPT_WITH_INPUT,
    RowOrder,
    Tokens,
    encode_instruct,
    encode_pairs,
    encode_prompts,
    held_out_steps,
    instruct_prompt,
    loss_places,
    micro_steps,
    pad_left,
    pad_right,
)
from bench.errors import DataError
from bench.models.tokenizer import load_tokenizer
from tests.trials import tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("collate")))


def test_the_templates_are_those_of_alpaca():
    plain = instruct_prompt({"instruction": "Add 1 and 2.", "input": "", "output": "3"})
    assert plain == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:"
    )
    with_input = instruct_prompt({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert with_input == PROMPT_WITH_INPUT.format(instruction="Add.", input="1 2")
    assert "paired with an input that provides further context" in with_input


def test_braces_in_an_instruction_are_text():
    assert "{x} {0}" in instruct_prompt({"instruction": "{x} {0}", "input": ""})


def test_a_sequence_is_prompt_output_and_eos(tokenizer):
    row = {"instruction": "Add 1 and 2.", "input": "", "output": "The sum is 3."}
    (sequence,) = encode_instruct([row], tokenizer, 512)
    assert tokenizer.decode(sequence.ids) == instruct_prompt(row) + "The sum is 3." + tokenizer.eos_token
    assert tokenizer.decode(sequence.ids[sequence.prompt :]) == "The sum is 3." + tokenizer.eos_token
    assert sequence.loss_tokens == len(sequence.ids) - sequence.prompt


def test_long_sequences_are_cut_at_the_end_and_may_lose_all_their_loss(tokenizer):
    row = {"instruction": "Add 1 and 2.", "input": "", "output": "The sum is 3."}
    (whole,) = encode_instruct([row], tokenizer, 512)
    (cut,) = encode_instruct([row], tokenizer, whole.prompt + 2)
    assert cut.ids == whole.ids[: whole.prompt + 2]
    assert cut.loss_tokens == 2
    (nothing,) = encode_instruct([row], tokenizer, 8)
    assert len(nothing.ids) == 8
    assert nothing.loss_tokens == 0


def test_pairs_share_their_prompt_and_end_with_eos(tokenizer):
    (pair,) = encode_pairs([{"prompt": "Human: hi", "chosen": " Gladly!", "rejected": " Go away!"}], tokenizer, 64)
    assert tokenizer.decode(pair.chosen) == "Human: hi Gladly!" + tokenizer.eos_token
    assert tokenizer.decode(pair.rejected) == "Human: hi Go away!" + tokenizer.eos_token


def test_a_long_prompt_keeps_its_end(tokenizer):
    whole = encode_prompts([{"instruction": "Which word is not slow?"}], tokenizer, 64)[0]
    assert encode_prompts([{"instruction": "Which word is not slow?"}], tokenizer, 3) == [whole[-3:]]


def test_a_long_prompt_keeps_the_first_token_that_its_tokenizer_puts_in_front():
    class WithBos:
        """Words as their lengths, behind a BOS of 1, as LLaMA's."""

        def __call__(self, texts, *, add_special_tokens, verbose):
            return {"input_ids": [[1] * add_special_tokens + [len(word) for word in text.split()] for text in texts]}

    assert encode_prompts([{"instruction": "aa bbb cccc"}, {"instruction": "aa"}], WithBos(), 3) == [[1, 3, 4], [1, 2]]


def test_loss_stands_where_the_next_token_is_predicted():
    places, targets = loss_places([Tokens([5, 6, 7, 8], 2), Tokens([9], 0), Tokens([4, 3], 2)], width=6)
    assert places.tolist() == [1, 2]
    assert targets.tolist() == [7, 8]


def test_a_batch_without_loss_tokens_has_one_place_that_counts_nothing():
    places, targets = loss_places([Tokens([4, 3], 2)], width=2)
    assert places.tolist() == [0]
    assert targets.tolist() == [NO_LOSS]


def test_padding_fills_the_side_that_is_asked_for_and_is_masked():
    right, left = pad_right([[1, 2, 3], [4]], 9), pad_left([[1, 2, 3], [4]], 9, width=4)
    assert right.ids_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left.ids_BT.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]]
    assert left.mask_BT.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    order = RowOrder(12, batch=4, seed=7)
    epochs = [[row for step in range(3 * epoch, 3 * epoch + 3) for row in order.rows(step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert epochs[0] == [row for step in range(3) for row in RowOrder(12, batch=4, seed=7).rows(step)]
    assert epochs[0] != [row for step in range(3) for row in RowOrder(12, batch=4, seed=8).rows(step)]


def test_rows_that_fill_no_global_batch_are_dropped():
    order = RowOrder(11, batch=4, seed=7)
    assert len({row for step in range(2) for row in order.rows(step)}) == 8
    assert order.used(1) == sorted(order.rows(0))


def test_used_rows_are_those_of_all_steps():
    order = RowOrder(9, batch=4, seed=1)
    assert order.used(7) == sorted({row for step in range(7) for row in order.rows(step)})


def test_too_few_rows_for_a_global_batch_are_told():
    with pytest.raises(DataError, match=r"too few training rows.*3 rows, 4 needed"):
        RowOrder(3, batch=4, seed=0)


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_the_ranks_take_the_same_global_batch_in_the_same_order(world, micro):
    parts = [micro_steps(range(8), rank=rank, world=world, micro=micro) for rank in range(world)]
    assert [row for step in zip(*parts, strict=True) for part in step for row in part] == list(range(8))


@pytest.mark.parametrize(("rows", "world", "micro"), [(7, 2, 2), (8, 2, 2), (1, 3, 4), (10, 1, 3)])
def test_held_out_rows_are_counted_once_and_every_rank_has_as_many_batches(rows, world, micro):
    parts = [list(held_out_steps(rows, rank=rank, world=world, micro=micro)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(places) == micro for part in parts for places, _ in part)
    counted = [place for part in parts for places, weights in part for place, weight in zip(places, weights, strict=True) if weight]
    assert sorted(counted) == list(range(rows))


def test_masks_do_not_look_at_ids():
    padded = pad_right([[9, 9], [9]], 9)
    assert torch.equal(padded.mask_BT, torch.tensor([[1, 1], [1, 0]]))
