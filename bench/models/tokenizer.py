"""Tokenizers: one trained on the suite's own texts for random weights, or the one that comes with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE of at most `vocabulary` tokens on `texts` and save it to `folder`.

    The same texts in the same order give the same files. Every string can be encoded (all 256 bytes are tokens), and the
    padding token is not the end-of-sequence token: upstream made them one, and masked real ends out of the loss.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False, padding_side="right"
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)


def load_tokenizer(folder: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer in `folder` (or of a hub id), with a padding token.

    One without padding token pads with its unknown or begin token, or failing that with its end token: masks must then come from
    lengths, never from `ids != pad`. Raises UserError if there is none, or none with an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), revision=revision, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no tokenizer can be loaded; {_first_line(error)}; a folder with tokenizer.json would be right"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no end-of-sequence token; seen: {tokenizer.special_tokens_map}; one with eos_token would be right"
        )
    if tokenizer.pad_token_id is None:
        spare = [token for token in (tokenizer.unk_token, tokenizer.bos_token) if token and token != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
