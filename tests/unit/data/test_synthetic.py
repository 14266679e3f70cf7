"""The synthetic sets: pinned bytes, the shapes of the real sets, short, and with a rule to learn."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.data import synthetic
from bench.data.fetch import fetch
from bench.data.formats import read_rows
from bench.data.sources import SOURCES
from bench.errors import DataError

NAMES = [name for name in SOURCES if name.startswith("synthetic-")]
ROOT = Path(__file__).resolve().parents[3]
KIND_WORDS = (*synthetic.KIND, *synthetic.KIND_ENDS)
RUDE_WORDS = (*synthetic.RUDE, *synthetic.RUDE_ENDS)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_source_table(name: str) -> None:
    data = synthetic.file_content(name)
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (SOURCES[name].sha256, SOURCES[name].bytes)


def test_neither_hash_seed_nor_random_state_nor_locale_matter() -> None:
    code = "import hashlib, random; random.seed(7); from bench.data.synthetic import file_content;"
    code += f"print([hashlib.sha256(file_content(name)).hexdigest() for name in {NAMES!r}])"
    environment = {**os.environ, "PYTHONHASHSEED": "99", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == str([SOURCES[name].sha256 for name in NAMES])


def test_the_global_random_state_is_left_alone() -> None:
    random.seed(1)
    before = random.getstate()
    synthetic.pair_rows(100)
    assert random.getstate() == before


def test_an_unknown_set_is_told() -> None:
    with pytest.raises(DataError, match="no synthetic data 'other'; there are synthetic-instruct"):
        synthetic.file_content("other")


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_generated_into_the_cache_once(tmp_path: Path, name: str) -> None:
    manifest = fetch(name, cache=tmp_path)
    assert (manifest.rows, manifest.rejected_count, manifest.sha256_status) == (SOURCES[name].rows, 0, "generated")
    written = Path(manifest.path).stat().st_mtime_ns
    assert fetch(name, cache=tmp_path) == manifest
    assert Path(manifest.path).stat().st_mtime_ns == written
    assert len(read_rows(Path(manifest.path), manifest.kind, rejected_share=0).rows) == manifest.rows


def test_instruct_rows_have_the_shape_of_instructwild_and_no_instruction_twice() -> None:
    rows = synthetic.instruct_rows()
    assert all(list(row) == ["instruction", "input", "output", "id"] for row in rows)
    assert all(row["input"] == "" and row["output"] for row in rows)
    assert len({row["instruction"] for row in rows}) == len({row["id"] for row in rows}) == 2000


def test_pairs_have_the_shape_of_rm_static() -> None:
    for row in synthetic.pair_rows():
        assert list(row) == ["prompt", "response", "chosen", "rejected"]
        assert row["prompt"].startswith("\n\nHuman: ")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"].startswith(" ")
        assert row["rejected"].startswith(" ")


def manners(text: str) -> int:
    return sum(word in text for word in KIND_WORDS) - sum(word in text for word in RUDE_WORDS)


def test_the_chosen_answer_is_always_the_kinder_one() -> None:
    rows = synthetic.pair_rows()
    assert all(manners(row["chosen"]) > manners(row["rejected"]) for row in rows)
    steps = [(manners(row["chosen"]), manners(row["rejected"])) for row in rows]
    assert {step: steps.count(step) for step in set(steps)} == {(1, -1): 500, (1, 0): 250, (0, -1): 250}


def test_length_does_not_give_the_chosen_answer_away() -> None:
    rows = synthetic.pair_rows()
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert 400 < longer < 600


def test_a_policy_learns_kind_words_and_no_rude_ones() -> None:
    kinds = [manners(row["output"]) for row in synthetic.instruct_rows()]
    assert min(kinds) == 0
    assert 0.4 < sum(kind > 0 for kind in kinds) / len(kinds) < 0.6


def test_prompts_are_instructions_that_can_be_answered() -> None:
    known = {instruction for family in synthetic.FAMILIES for instruction, _ in family()}
    rows = synthetic.prompt_rows()
    assert {row["instruction"] for row in rows} <= known
    assert all(list(row) == ["instruction", "id"] for row in rows)


def test_texts_are_short_in_tokens_of_a_small_vocabulary() -> None:
    from tokenizers import ByteLevelBPETokenizer

    rows, pairs = synthetic.instruct_rows(), synthetic.pair_rows()
    tokenizer = ByteLevelBPETokenizer()
    corpus = [text for row in rows for text in (row["instruction"], row["output"])] + [
        text for row in pairs for text in (row["chosen"], row["rejected"])
    ]
    tokenizer.train_from_iterator(corpus, vocab_size=1024, show_progress=False)

    def longest(texts: list[str]) -> int:
        return max(len(tokenizer.encode(text).ids) for text in texts)

    assert longest([row["prompt"] for row in pairs]) <= 30
    assert longest([row["instruction"] for row in rows]) <= 16
    assert longest([row["output"] for row in rows]) <= 16
    assert longest([row[key] for row in pairs for key in ("chosen", "rejected")]) <= 16


def test_more_rows_than_the_families_have_are_an_error() -> None:
    with pytest.raises(DataError, match="9999 synthetic rows asked for; the task families have 2822"):
        synthetic.instruct_rows(9999)


# -- generated answers to given prompts ----------------------------------------------------------------------------


PROMPTS = [
    {"instruction": "Write a poem about the sea, please, in rhyme.", "id": "x"},
    {"instruction": "写一首关于大海的诗，每行都要押韵。"},
    {"instruction": "!"},
]


def test_an_answer_depends_on_its_prompt_only() -> None:
    alone = [synthetic.answered([row])[0]["output"] for row in PROMPTS]
    assert [row["output"] for row in synthetic.answered(PROMPTS)] == alone
    assert alone[0].startswith('About "Write a poem about the sea,": ')
    assert alone[1].startswith("关于“写一首关于大海的诗，每行”：")
    assert [row["id"] for row in synthetic.answered(PROMPTS)] == ["x", 2, 3]


def test_answers_vary_in_length_as_real_ones_do() -> None:
    words = [len(row["output"].split()) for row in synthetic.answered({"instruction": f"Tell me about {number}."} for number in range(300))]
    assert min(words) < 20
    assert max(words) > 80


def test_pairs_for_given_prompts_follow_the_same_rule() -> None:
    rows = synthetic.paired([{"instruction": f"Tell me about {number}."} for number in range(100)])
    assert all(manners(row["chosen"]) > manners(row["rejected"]) for row in rows)
    assert rows[3]["prompt"] == "\n\nHuman: Tell me about 3.\n\nAssistant:"


def test_answers_for_a_file_are_made_again_when_the_file_changes(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"instruction": "Say a"}\n')
    name = f"file:{source}+synthetic-instruct"
    first = fetch(name, cache=tmp_path / "cache")
    assert fetch(name, cache=tmp_path / "cache") == first
    source.write_text('{"instruction": "Say a"}\n{"instruction": "Say b"}\n')
    second = fetch(name, cache=tmp_path / "cache")
    assert (first.rows, second.rows) == (1, 2)
    assert first.base_sha256 != second.base_sha256
    assert [row["instruction"] for row in read_rows(Path(second.path), "instruct").rows] == ["Say a", "Say b"]


def test_two_files_of_one_name_do_not_share_a_place(tmp_path: Path) -> None:
    paths = []
    for folder in ("a_b", "a b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.json").write_text(f'{{"instruction": "{folder}"}}')
        paths.append(fetch(f"file:{tmp_path}/{folder}/rows.json+synthetic-pairs", cache=tmp_path / "cache").path)
    assert paths[0] != paths[1]
    relative = fetch("file:rows.json+synthetic-pairs", cache=tmp_path / "cache", folder=tmp_path / "a b")
    assert relative.path == paths[1]
