"""A prompt file for PPO, drawn from an instruction file."""

from __future__ import annotations

from pathlib import Path

from bench.data.download import writing
from bench.data.draws import Draws
from bench.data.formats import read_rows
from bench.data.synthetic import Row
from bench.errors import DataError, UserError
from bench.record import write_json


def sample_prompts(source: Path, target: Path, *, count: int, seed: int = 42, rejected_share: float = 0.01) -> list[Row]:
    """Write `count` rows of `source`, drawn without replacement by `seed`, to `target`, and return them.

    `target` becomes a JSON array of `{instruction, id}`, ids from 0 in drawn order (as coati's
    `generate_prompt_dataset.py` numbers them); it is written whole or not at all, and the same file and seed give the
    same bytes. `source` is a JSON array, JSON Lines or Parquet, whatever its name ends with. Raises UserError if there
    are fewer than `count` rows.
    """
    if count < 1:
        raise UserError(f"--count {count}: draw at least 1 prompt")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target}: is the file that prompts are drawn from; give another name for the result")
    rows = read_rows(source, "prompts", rejected_share=rejected_share).rows
    if count > len(rows):
        raise DataError(f"{source}: has {len(rows)} usable rows, {count} prompts are to be drawn without replacement; lower --count")
    drawn = Draws(f"prompts:{seed}").sample(rows, count)
    prompts = [{"instruction": row["instruction"], "id": number} for number, row in enumerate(drawn)]
    with writing(target, fetched=False):
        write_json(prompts, target)
    return prompts
