"""Reading rows: JSON arrays, JSON Lines, gzip and Parquet, as they are found in the wild."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data import raw as raw_values
from bench.data.formats import Rejected, guess_kind, read_rows
from bench.data.raw import raw_rows
from bench.errors import DataError

ROWS = [{"instruction": f"Ask {number}", "input": "", "output": f"Answer {number}"} for number in range(5)]


def save(tmp_path: Path, data: bytes | str, name: str = "rows.json") -> Path:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


ENCODINGS = {
    "array": json.dumps(ROWS).encode(),
    "indented array": json.dumps(ROWS, indent=4).encode(),
    "array with CRLF": json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(),
    "array with BOM": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "array after blank lines": b"\n\n  " + json.dumps(ROWS).encode() + b"\n\n",
    "lines": lines(ROWS).encode(),
    "lines with CRLF": lines(ROWS).replace("\n", "\r\n").encode(),
    "lines with BOM": b"\xef\xbb\xbf" + lines(ROWS).encode(),
    "lines without the last line feed": lines(ROWS).rstrip("\n").encode(),
    "lines with blank ones between": lines(ROWS).replace("\n", "\n\n  \n").encode(),
    "gzipped array": gzip.compress(json.dumps(ROWS).encode()),
    "gzipped lines": gzip.compress(lines(ROWS[:2]).encode()) + gzip.compress(lines(ROWS[2:]).encode()),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_content_decides_how_a_file_is_read_not_its_name(tmp_path: Path, encoding: str, name: str) -> None:
    found = read_rows(save(tmp_path, ENCODINGS[encoding], name), "instruct", rejected_share=0)
    assert found.rows == ROWS
    assert found.rejected == []


def test_parquet_is_read_and_other_columns_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"prompt": "p", "response": "r", "chosen": f"c{n}", "rejected": "j", "extra": n} for n in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    found = read_rows(path, "pairs")
    assert found.rows[0] == {"prompt": "p", "chosen": "c0", "rejected": "j"}
    assert [row["chosen"] for row in found.rows] == [f"c{n}" for n in range(3000)]


def test_a_null_in_parquet_is_rejected_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "chosen": ["x", None], "rejected": ["y", "z"]}), path)
    assert read_rows(path, "pairs", rejected_share=0.5).rejected == [Rejected(2, "'chosen' is null, not text")]


@pytest.mark.parametrize("text", ["第一\u2028第二", "a\u2029b", "a\x85b", "a\x0bb\x0cc", "🙂", "línea", "a\tb"])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, text: str, form: str) -> None:
    rows = [{"instruction": text, "input": text, "output": text}] * 2
    data = lines(rows) if form == "lines" else json.dumps(rows, ensure_ascii=False)
    assert read_rows(save(tmp_path, data), "instruct").rows == rows


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    rows=st.lists(
        st.fixed_dictionaries({"instruction": texts, "input": st.text(st.characters(exclude_categories=["Cs"])), "output": texts}),
        min_size=1,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_text_survives_in_any_form(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("forms")
    for number, data in enumerate((json.dumps(rows, ensure_ascii=False), json.dumps(rows, indent=2), lines(rows))):
        assert read_rows(save(folder, data, f"{number}"), "instruct", rejected_share=0).rows == rows


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if "gzip" not in name])
def test_chunk_borders_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, encoding: str) -> None:
    path = save(tmp_path, ENCODINGS[encoding].replace(b"Ask 3", "问 3 🙂".encode()))
    whole = list(raw_rows(path))
    monkeypatch.setattr(raw_values, "CHUNK_BYTES", chunk)
    assert list(raw_rows(path)) == whole
    assert whole[3].value["instruction"] == "问 3 🙂"


@pytest.mark.parametrize("chunk", range(1, 12))
def test_a_number_is_not_cut_in_two_at_a_chunk_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(raw_values, "CHUNK_BYTES", chunk)
    assert [raw.value for raw in raw_rows(save(tmp_path, "[123456789, 1234.5678, 42]"))] == [123456789, 1234.5678, 42]


# -- rows that are rejected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"instruction": "a"}', "no field 'output'; the row has 'instruction'"),
        ("{}", "no field 'instruction'; the row has none"),
        ('{"instruction": 3, "output": "b"}', "'instruction' is a number, not text"),
        ('{"instruction": "a", "output": null}', "'output' is null, not text"),
        ('{"instruction": "a", "output": ["b"]}', "'output' is an array, not text"),
        ('{"instruction": "a", "output": "b", "input": {}}', "'input' is an object, not text"),
        ('{"instruction": "  ", "output": "b"}', "'instruction' is empty"),
        ('{"instruction": "a", "output": "b", "id": [1]}', "'id' is an array, not text or a whole number"),
        ('{"instruction": "a", "output": "b", "id": true}', "'id' is true or false, not text or a whole number"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' stands twice"),
        ('{"instruction": "a", "output": "\\ud83d"}', "'output' has half a surrogate pair, which is no text"),
        ('{"instruction": "a", "output": NaN}', "'output' is null, not text"),
        ('["a", "b"]', "not an object but an array"),
        ('"a"', "not an object but text"),
        ("17", "not an object but a number"),
        ("null", "not an object but null"),
    ],
)
def test_a_row_that_is_not_usable_is_rejected_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    for data, number in ((lines(ROWS) + line + "\n", 6), (f"[\n{json.dumps(ROWS[0])},\n\n{line}]", 4)):
        found = read_rows(save(tmp_path, data), "instruct", rejected_share=0.5)
        assert found.rejected == [Rejected(number, reason)]
        assert found.rows == ROWS[: len(found.rows)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"instruction": "a", "output": "b"', "not JSON: Expecting ',' delimiter at column 35"),
        ("instruction,output", "not JSON: Expecting value at column 1"),
        ('{"instruction": "a", "output": "b"} {}', "not JSON: Extra data at column 37"),
        ("[" * 100_000, "not usable JSON: nested too deeply; a row is an object of texts"),
        ('{"id": ' + "9" * 5000 + "}", "not usable JSON: a number has too many digits; a row has texts"),
    ],
)
def test_a_line_that_is_no_json_is_rejected_and_the_rest_is_read(tmp_path: Path, line: str, reason: str) -> None:
    found = read_rows(save(tmp_path, lines(ROWS[:2]) + line + "\n" + lines(ROWS[2:])), "instruct", rejected_share=0.2)
    assert found.rows == ROWS
    [rejected] = found.rejected
    assert rejected.line == 3
    assert rejected.reason.startswith(reason)


def test_too_many_rejected_rows_are_an_error_that_names_the_first(tmp_path: Path) -> None:
    path = save(tmp_path, lines(ROWS[:2]) + "one\ntwo\nthree\nfour\n")
    with pytest.raises(DataError) as caught:
        read_rows(path, "instruct", rejected_share=0.5)
    assert str(caught.value) == (
        f"{path}: 4 of 6 rows are not usable as instruct (at most 50.00% may be): line 3: not JSON: Expecting value at column 1;"
        " line 4: not JSON: Expecting value at column 1; line 5: not JSON: Expecting value at column 1;"
        " a row has the fields instruction, output (and input, id)"
    )
    assert len(read_rows(path, "instruct", rejected_share=0.67).rows) == 2


def test_the_share_of_rejected_rows_is_a_limit_that_may_be_reached(tmp_path: Path) -> None:
    path = save(tmp_path, lines(ROWS[:2]) + "one\ntwo\n")
    assert len(read_rows(path, "instruct", rejected_share=0.5).rejected) == 2
    with pytest.raises(DataError, match="2 of 4 rows are not usable"):
        read_rows(path, "instruct", rejected_share=0.49)


def test_a_file_without_a_usable_row_is_an_error_even_if_all_may_be_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 rows are not usable as pairs"):
        read_rows(save(tmp_path, lines(ROWS[:1])), "pairs", rejected_share=1.0)


@pytest.mark.parametrize("data", ["", "\n \n", "[]", " [ ] ", "\ufeff"])
def test_an_empty_file_has_no_rows(tmp_path: Path, data: str) -> None:
    with pytest.raises(DataError, match="has no rows; a data file has at least one"):
        read_rows(save(tmp_path, data), "instruct")


def test_missing_input_and_id_have_their_defaults_and_other_fields_are_left_out(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "more": 1}, {"instruction": "a", "input": None, "output": "", "id": "7"}]
    assert read_rows(save(tmp_path, lines(rows)), "instruct").rows == [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": "", "output": "", "id": "7"},
    ]
    assert read_rows(save(tmp_path, lines(rows)), "prompts").rows == [{"instruction": "a"}, {"instruction": "a", "id": "7"}]


def test_only_the_first_rows_are_read_if_so_asked(tmp_path: Path) -> None:
    path = save(tmp_path, lines(ROWS) + "broken\n" * 100)
    assert read_rows(path, "instruct", first=3).rows == ROWS[:3]
    with pytest.raises(DataError):
        read_rows(path, "instruct")


# -- files that are damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [30, 60, 61, 62, 63, 119, 120, 121])
def test_an_array_that_is_cut_off_is_told(tmp_path: Path, end: int) -> None:
    data = json.dumps(ROWS, separators=(",", ":"))[:end]
    with pytest.raises(
        DataError,
        match=r"the JSON array is cut off or broken after \d rows?, at line 1 .*; a whole one ends with '\]': fetch the file again",
    ):
        read_rows(save(tmp_path, data), "instruct", rejected_share=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            '[\n{"instruction": "a",\n "output": "b"}\n{"instruction": "c"}]',
            "not a JSON array: after 1 row, at line 4: expected ',' or ']', seen '{'",
        ),
        ('[{"instruction": "a", "output": "b"}] []', "line 1: text after the end of the JSON array: '['"),
        ("[1, 2, oops]", "not a JSON array: after 2 rows, at line 1: Expecting value"),
        ('[{"a": 1},]', "not a JSON array: after 1 row, at line 1: Expecting value"),
    ],
)
def test_an_array_that_is_broken_is_told_with_its_line(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(save(tmp_path, data), "instruct", rejected_share=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "byte", "line"),
    [
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "caf\xe9", "output": "b"}\n', 56, 2),
        (b"\xef\xbb\xbf" + b'{"instruction": "caf\xe9"}\n', 23, 1),
        (b'[\n{"instruction": "caf\xe9", "output": "b"}]', 22, 2),
        (b"\xef\xbb\xbf" + b'[\n\n{"instruction": "caf\xe9"}]', 26, 3),
        (b'["\xe4\xb8', 2, 1),
        ('[{"instruction": "a"}]'.encode("utf-16"), 0, 1),
    ],
)
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_what_is_not_utf8_is_told_by_its_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, byte: int, line: int, chunk: int
) -> None:
    monkeypatch.setattr(raw_values, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError, match=rf"not UTF-8 at byte {byte} \(0x[0-9a-f]{{2}}, line {line}\)"):
        read_rows(save(tmp_path, data), "instruct", rejected_share=1)


def test_a_web_page_is_not_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an HTML or XML page, not data: '<!DOCTYPE html>"):
        read_rows(save(tmp_path, "\n<!DOCTYPE html><html></html>"), "instruct", rejected_share=1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage after"])
def test_a_damaged_gzip_file_is_told(tmp_path: Path, damage: str) -> None:
    whole = bytearray(gzip.compress(lines(ROWS * 500).encode()))
    if damage == "cut":
        del whole[-40:]
    elif damage == "flipped":
        whole[-6] ^= 0xFF
    else:
        whole += b"rubbish"
    with pytest.raises(DataError, match="the gzip file is damaged or cut off"):
        read_rows(save(tmp_path, bytes(whole)), "instruct")


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="the Parquet file is damaged or cut off"):
        read_rows(path, "prompts")


@pytest.mark.parametrize(("compression", "why"), [("snappy", "Corrupt snappy compressed data"), ("none", "'utf-8' codec can't decode")])
def test_a_parquet_file_with_a_flipped_byte_is_told_in_one_line(compression: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": [f"ask {i} {i}" for i in range(300)], "output": ["yes"] * 300}), path, compression=compression)
    whole = path.read_bytes()
    seen = set()
    for at in range(40, 2000, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with suppress(DataError):
            read_rows(path, "instruct", rejected_share=1.0)
            continue
        with pytest.raises(DataError) as error:
            read_rows(path, "instruct", rejected_share=1.0)
        seen.add(str(error.value))
    told = [text for text in seen if text.startswith(f"{path}: the Parquet file is damaged or cut off: {why}")]
    assert told
    assert all(text.endswith("; fetch it again") and "\n" not in text for text in told)
    assert not any("cannot be read" in text for text in seen)


def test_a_number_of_too_many_digits_in_an_array_is_told_in_our_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a number has too many digits; a row has texts") as error:
        read_rows(save(tmp_path, '[{"id": ' + "9" * 5000 + "}]"), "instruct")
    assert "sys." not in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        read_rows(tmp_path / "none", "instruct")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_rows(tmp_path, "instruct")


def test_a_line_without_end_is_refused_before_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_values, "LONGEST_ROW_BYTES", 10_000)
    monkeypatch.setattr(raw_values, "CHUNK_BYTES", 1000)
    with pytest.raises(DataError, match="line 1 is longer than 10000 bytes"):
        read_rows(save(tmp_path, '{"instruction": "' + "a" * 50_000), "instruct")
    with pytest.raises(DataError, match=r"cut off or broken after 0 rows|not a JSON array: after 0 rows"):
        read_rows(save(tmp_path, '[{"instruction": "' + "a" * 50_000), "instruct")


@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_large_file_is_read_as_a_stream(tmp_path: Path, form: str) -> None:
    count, row = 12_000, json.dumps({"instruction": "a" * 500, "output": "b" * 500})
    data = "[" + ",".join([row] * count) + "]" if form == "array" else (row + "\n") * count
    path = save(tmp_path, data)
    size = len(data)
    del data
    tracemalloc.start()
    assert sum(1 for _ in raw_rows(path)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 12e6
    assert peak < 8e6


# -- kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "instruct"),
        ({"instruction": "a"}, "prompts"),
        ({"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}, "pairs"),
        ({"chosen": "c", "rejected": "d"}, "pairs"),
    ],
)
def test_the_kind_is_guessed_from_the_first_row(tmp_path: Path, row: dict[str, str], kind: str) -> None:
    assert guess_kind(save(tmp_path, lines([row, {"x": 1}]))) == kind


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"question": "a"}', "the first row has the fields question; known are instruct: instruction, output"),
        ("a,b,c\n1,2,3\n", "line 1: not JSON: Expecting value at column 1; a data file is a JSON array, JSON Lines or Parquet"),
        ("[1]", "line 1: not an object"),
        ("", "has no rows"),
    ],
)
def test_an_unknown_shape_is_told(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        guess_kind(save(tmp_path, data))
    assert message in str(caught.value)


TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (TURNS + " Because.", TURNS + " No.", {"prompt": TURNS, "chosen": " Because.", "rejected": " No."}),
        (TURNS + " Same.", TURNS + " Same.", {"prompt": TURNS, "chosen": " Same.", "rejected": " Same."}),
        (TURNS + "", TURNS + " No.", {"prompt": TURNS, "chosen": "", "rejected": " No."}),
        (
            "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
            "\n\nHuman: Hi\n\nAssistant: D",
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " A\n\nHuman: B\n\nAssistant: C", "rejected": " D"},
        ),
    ],
)
def test_dialogues_are_split_at_the_last_answer_that_they_share_the_way_to(
    tmp_path: Path, chosen: str, rejected: str, expected: dict[str, str]
) -> None:
    assert read_rows(save(tmp_path, lines([{"chosen": chosen, "rejected": rejected}])), "pairs").rows == [expected]


@pytest.mark.parametrize(("chosen", "rejected"), [("Hello", "Hi"), ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d")])
def test_dialogues_that_share_no_prompt_are_rejected(tmp_path: Path, chosen: str, rejected: str) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    [row] = read_rows(save(tmp_path, lines([good, {"chosen": chosen, "rejected": rejected}])), "pairs", rejected_share=0.5).rejected
    assert row == Rejected(2, "no field 'prompt', and the two dialogues share no turn that ends with 'Assistant:'")


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys, bench.data.formats, bench.data.sources, bench.data.fetch, bench.data.commands, bench.data.prompts, bench.data.splits;"
    )
    heavy = "print([name for name in ('torch', 'transformers', 'colossalai', 'pyarrow', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "[]"
