from __future__ import annotations

import pytest
import torch

from bench.data.collate import Pair
from bench.errors import DataError
from bench.stages.rm import check_pairs, right_pairs


def test_a_tie_is_half_right() -> None:
    assert right_pairs(torch.tensor([0.5, -0.5, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_pairs_that_were_cut_before_their_answers_differ_are_refused_where_most_are() -> None:
    same, other = Pair([1, 2], [1, 2]), Pair([1, 2], [1, 3])
    check_pairs([same, other], 2)
    with pytest.raises(DataError, match="2 of 3 training pairs are the same on both sides: sequence_length 2 cuts them"):
        check_pairs([same, same, other], 2)
