"""Values out of files, one a row, before anybody asks what they mean: JSON arrays, JSON Lines, gzip and Parquet.

Files are read as streams. A line that is no JSON is told as such and reading goes on; a file that is damaged as a whole
(cut off, not UTF-8, a web page) is a DataError.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bench.errors import DataError

CHUNK_BYTES = 1 << 20
LONGEST_ROW_BYTES = 64 << 20
Stream = BinaryIO | gzip.GzipFile


class Raw(NamedTuple):
    """One row as it stands in the file: a parsed value, or the reason why it could not be parsed."""

    line: int
    value: Any
    reason: str | None = None


class Repeated(NamedTuple):
    """Stands for an object in which a key stands twice."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> Any:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    keys = [key for key, _ in pairs]
    return Repeated(next(key for key in keys if keys.count(key) > 1))


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)


def raw_rows(path: Path) -> Iterator[Raw]:
    """Yield every row of `path` with its line, blank lines left out. Raises DataError if the file is damaged."""
    with _opened(path) as file:
        head = file.peek(8)[:8] if hasattr(file, "peek") else b""
        if head[:4] == b"PAR1":
            yield from _parquet_rows(path)
            return
        if head[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from _text_rows(path, unpacked)
            return
        yield from _text_rows(path, file)


# -- containers ----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off: {error}; fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; give the path of a data file") from None


def _parquet_rows(path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {"instruction", "input", "output", "id", "prompt", "chosen", "rejected"}
    try:
        with pq.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in wanted]
            line = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield Raw(line, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; pyarrow's own, on what it cannot unpack, has no number
        seen = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{path}: the Parquet file is damaged or cut off: {seen}; fetch it again") from None


def _text_rows(path: Path, file: Stream) -> Iterator[Raw]:
    start = seen = b""
    while (len(start) < len(codecs.BOM_UTF8) or not seen) and (more := file.read(CHUNK_BYTES)):
        start += more
        seen = start.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if seen[:1] == b"<":
        raise DataError(f"{path}: an HTML or XML page, not data: {seen[:60].decode('utf-8', 'replace')!r}; fetch the file again")
    if seen[:1] == b"[":
        yield from _array_rows(path, start, file)
    else:
        yield from _line_rows(path, start, file)


# -- JSON Lines ----------------------------------------------------------------------------------------------------


def _lines(path: Path, start: bytes, file: Stream) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, byte offset, line); only the line feed ends a line, so that U+2028 and its like stay text."""
    rest, number, offset = start, 0, 0
    while True:
        *whole, rest = rest.split(b"\n")
        for line in whole:
            number += 1
            yield number, offset, line
            offset += len(line) + 1
        if len(rest) > LONGEST_ROW_BYTES:
            raise DataError(f"{path}: line {number + 1} is longer than {LONGEST_ROW_BYTES} bytes; rows are JSON objects of one line each")
        chunk = file.read(CHUNK_BYTES)
        if not chunk:
            break
        rest += chunk
    yield number + 1, offset, rest


def _line_rows(path: Path, start: bytes, file: Stream) -> Iterator[Raw]:
    for number, offset, line in _lines(path, start, file):
        try:
            text = line.decode("utf-8").strip(" \t\r")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, line[error.start], number) from None
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text:
            yield _parsed_line(number, text)


def _parsed_line(number: int, text: str) -> Raw:
    try:
        return Raw(number, _decoder.decode(text))
    except json.JSONDecodeError as error:
        return Raw(number, None, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Raw(number, None, f"not usable JSON: {_limit(error)}")


def _limit(error: Exception) -> str:
    """Which limit valid JSON goes beyond."""
    if isinstance(error, RecursionError):
        return "nested too deeply; a row is an object of texts"
    return "a number has too many digits; a row has texts, and its id at most 4300 digits"


def _not_utf8(path: Path, offset: int, byte: int, line: int) -> DataError:
    return DataError(f"{path}: not UTF-8 at byte {offset} (0x{byte:02x}, line {line}); data files are UTF-8 text, convert it first")


# -- JSON arrays ---------------------------------------------------------------------------------------------------


class _Text:
    """A sliding window over UTF-8 text that knows the line number of its cursor."""

    def __init__(self, path: Path, start: bytes, file: Stream) -> None:
        self.path, self.file = path, file
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.bytes_read, self.line, self.at, self.ended = 0, 1, 0, False
        self.text = ""
        self._feed(start.removeprefix(codecs.BOM_UTF8), skipped=len(start) - len(start.removeprefix(codecs.BOM_UTF8)))

    def _feed(self, chunk: bytes, skipped: int = 0) -> None:
        self.bytes_read += skipped
        pending = self.decode.getstate()[0]
        try:
            self.text += self.decode.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            begin = self.bytes_read - len(pending)
            good = (pending + chunk)[: error.start]
            line = self.line + self.text.count("\n", self.at) + good.count(b"\n")
            raise _not_utf8(self.path, begin + error.start, (pending + chunk)[error.start], line) from None
        self.bytes_read += len(chunk)

    def more(self) -> bool:
        """Read on, at least as much as is waiting; False at the end of the file."""
        chunk = b"" if self.ended else self.file.read(max(CHUNK_BYTES, len(self.text) - self.at))
        if not chunk:
            if not self.ended:
                self._feed(b"")
            self.ended = True
            return False
        self.text, self.at = self.text[self.at :], 0
        self._feed(chunk)
        return True

    def move(self, to: int) -> None:
        """Move the cursor forward to index `to` of the window."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def skip_space(self) -> str:
        """Move to the next character that is no white space and return it; "" at the end."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in " \t\r\n":
                to += 1
            self.move(to)
            if to < len(self.text):
                return self.text[to]
            if not self.more():
                return ""


def _array_rows(path: Path, start: bytes, file: Stream) -> Iterator[Raw]:
    text = _Text(path, start, file)
    text.skip_space()
    text.move(text.at + 1)
    count = 0
    if text.skip_space() == "]":
        text.move(text.at + 1)
    else:
        while True:
            line = text.line
            yield Raw(line, _array_value(text, count))
            count += 1
            mark = text.skip_space()
            if mark not in (",", "]"):
                raise _broken_array(text, count, f"expected ',' or ']', seen {mark!r}")
            text.move(text.at + 1)
            if mark == "]":
                break
            text.skip_space()
    if after := text.skip_space():
        raise DataError(f"{path}: line {text.line}: text after the end of the JSON array: {after!r}; a file holds one array")


def _array_value(text: _Text, count: int) -> Any:
    while True:
        try:
            value, end = _decoder.raw_decode(text.text, text.at)
            # Only brackets and quotes say where a value ends; of a number the rest may be yet to come ("12" of "12.5").
            if text.text[end - 1] in '}]"' or text.text[end : end + 1] in (",", "]", " ", "\n") or not text.more():
                break
        except json.JSONDecodeError as error:
            # The row may merely reach past the window; one that is far longer than any row is broken.
            if len(text.text) - text.at > LONGEST_ROW_BYTES or not text.more():
                raise _broken_array(text, count, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _broken_array(text, count, _limit(error)) from None
    text.move(end)
    return value


def _broken_array(text: _Text, count: int, why: str) -> DataError:
    after = f"after {count} row{'s' * (count != 1)}, at line {text.line}"
    if text.ended and text.text[text.at :].lstrip()[:1] in ("", "{", '"'):
        what = f"the JSON array is cut off or broken {after} ({why})"
        return DataError(f"{text.path}: {what}; a whole one ends with ']': fetch the file again")
    return DataError(f"{text.path}: not a JSON array: {after}: {why}; rows are objects separated by commas")
