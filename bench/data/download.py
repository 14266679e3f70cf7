"""One file over HTTP into a `.part` file that survives being killed: resume, retry, time limits, confirmation pages.

Nothing here knows what the file should contain; a wrong hash is judged in `fetch.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import httpx
import tenacity

from bench.errors import MachineError, UserError

LARGEST_PAGE_BYTES = 1 << 20
DRIVE = "drive+"
"""Prefix of an address that may show Google Drive's confirmation page before the file."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes on disk and the size, if known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long, and how often, a download is tried."""

    connect_seconds: float = 15.0
    stall_seconds: float = 60.0
    """Longest silence of a server that is sending."""
    total_seconds: float = 6 * 3600.0
    """For one address, all tries and pauses included."""
    fruitless_tries: int = 5
    """Tries in a row that bring no new byte."""
    pause_seconds: float = 1.0
    """First pause between tries; each is twice the last."""
    longest_pause_seconds: float = 30.0


class AddressError(Exception):
    """An address that does not give the file (moved, forbidden, a web page); another one may."""


class Unreachable(AddressError):  # noqa: N818 (a state of the network, not of the program)
    """The address did not answer usefully in time, however often it was tried."""


class _Passing(Exception):  # noqa: N818
    """Worth another try."""


@dataclass(slots=True)
class _Part:
    """The `.part` file and what must still hold for it to be continued."""

    path: Path
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def _state_path(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def open(self, url: str) -> None:
        """Keep what is there if it was begun from `url`, else start anew."""
        with suppress(OSError, ValueError):
            self.state = json.loads(self._state_path.read_text(encoding="utf-8"))
        if not isinstance(self.state, dict) or self.state.get("url") != url:
            self.restart(url)

    def restart(self, url: str, **state: Any) -> None:
        self.state = {"url": url, **state}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Emptied first: a process killed between the two leaves nothing that the new state would vouch for.
            self.path.open("wb").close()
            self._state_path.write_text(json.dumps(self.state), encoding="utf-8")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, *, fetched: bool = True) -> Iterator[None]:
    """Turn what a disk says while `path` is written into an error for the user; a `.part` file stays for the next try.

    `fetched`: it lies where fetched data do, which the user may place elsewhere; else the user has named `path` itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            kept = " (data: --cache, COATI_BENCH_CACHE); what has arrived is kept and continued" if fetched else ""
            raise MachineError(
                f"{path}: cannot be written: {os.strerror(error.errno)}; free some space, or use another disk{kept}"
            ) from None
        right = "use a folder that can be written (data: --cache, COATI_BENCH_CACHE)" if fetched else "name a file that can be written"
        raise UserError(f"{path}: cannot be written: {error.strerror}; {right}") from None


def discard_part(path: Path) -> None:
    """Remove the `.part` file and its state."""
    _Part(path).remove()


def download(url: str, path: Path, *, patience: Patience, progress: Progress | None = None, size: int | None = None) -> bool:
    """Bring the whole of `url` to `path`; return whether bytes of an earlier try were kept.

    `size` is the size that the file must have, if that is known for sure. Raises AddressError or Unreachable if the address does not
    give it, MachineError or UserError if it cannot be written. What has arrived stays in `path` either way.
    """
    part = _Part(path)
    part.open(url)
    resumed = part.size > 0
    transfer = _Transfer(url, part, patience, progress, size)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Passing),
        wait=tenacity.wait_exponential(multiplier=patience.pause_seconds, max=patience.longest_pause_seconds),
        stop=transfer.is_hopeless,
        reraise=True,
    )
    try:
        retrying(transfer.attempt)
    except _Passing as error:
        raise Unreachable(f"{error} ({transfer.tries} tries)") from None
    return resumed


class _Transfer:
    """The tries at one address."""

    def __init__(self, url: str, part: _Part, patience: Patience, progress: Progress | None, size: int | None) -> None:
        self.url, self.part, self.patience, self.progress, self.size = url, part, patience, progress, size
        self.deadline = time.monotonic() + patience.total_seconds
        self.tries, self.fruitless, self.most = 0, 0, part.size

    def is_hopeless(self, _: tenacity.RetryCallState) -> bool:
        return self.fruitless >= self.patience.fruitless_tries or time.monotonic() > self.deadline

    def attempt(self) -> None:
        self.tries += 1
        self.fruitless += 1
        timeout = httpx.Timeout(self.patience.stall_seconds, connect=self.patience.connect_seconds)
        try:
            with httpx.Client(timeout=timeout, follow_redirects=True, headers={"Accept-Encoding": "identity"}) as client:
                address = self._address(client)
                with client.stream("GET", address, headers=self._range()) as response:
                    self._receive(response)
        except httpx.TimeoutException as error:
            raise _Passing(f"no answer in time ({type(error).__name__})") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise AddressError(str(error)) from None
        except httpx.TransportError as error:
            raise _Passing(str(error) or type(error).__name__) from None

    def _address(self, client: httpx.Client) -> str:
        return _confirmed(client, self.url.removeprefix(DRIVE)) if self.url.startswith(DRIVE) else self.url

    def _range(self) -> dict[str, str]:
        """Headers that continue the part; a part whose origin cannot be named is begun again."""
        validator, size = self.part.state.get("validator"), self.part.size
        if not size or not validator:
            return {}
        return {"Range": f"bytes={size}-", "If-Range": validator}

    def _receive(self, response: httpx.Response) -> None:
        if response.status_code == 416:
            self._beyond_the_end(response)
            return
        _check_status(response)
        total = self._begin(response)
        with writing(self.part.path), self.part.path.open("ab") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                file.flush()
                self._advanced(file.tell(), total)
        if total is not None and self.part.size < total:
            raise _Passing(f"the connection ended after {self.part.size} of {total} bytes")

    def _begin(self, response: httpx.Response) -> int | None:
        """Make the part ready for what follows; return the size of the whole file, if the server says it."""
        start, total = _extent(response)
        _check_is_file(response)
        if self.size is not None and total is not None and total != self.size:
            raise AddressError(f"the server has a file of {total} bytes; the right one has {self.size}")
        validator = _validator(response)
        continues = start == self.part.size and (validator is None or validator == self.part.state.get("validator"))
        if start and not continues:
            self.part.restart(self.url)
            raise _Passing("the server continued another file; starting again")
        if not start:
            self.part.restart(self.url, validator=validator)
        return total if total is not None else self.size

    def _beyond_the_end(self, response: httpx.Response) -> None:
        """The part is whole already, or is not of this file."""
        total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("content-range", ""))
        if total and int(total[1]) == self.part.size:
            return
        self.part.restart(self.url)
        raise _Passing("the part did not fit the file; starting again")

    def _advanced(self, size: int, total: int | None) -> None:
        if size > self.most:
            self.most, self.fruitless = size, 0
        if self.progress:
            self.progress(size, total)
        if time.monotonic() > self.deadline:
            raise Unreachable(f"not whole after {self.patience.total_seconds:g} seconds ({size} bytes have arrived and are kept)")


def _check_status(response: httpx.Response) -> None:
    code = response.status_code
    if code in (408, 425, 429) or code >= 500:
        raise _Passing(f"the server answered {code} {response.reason_phrase}")
    if code not in (200, 206):
        raise AddressError(f"the server answered {code} {response.reason_phrase}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise AddressError("the server compresses the transfer, so that its bytes are not those of the file")


def _check_is_file(response: httpx.Response) -> None:
    if _is_page(response):
        raise AddressError(f"a web page instead of the file: {_page_title(_page(response))}")


def _is_page(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml")


def _extent(response: httpx.Response) -> tuple[int, int | None]:
    """Where the body begins in the file, and the size of the file."""
    if response.status_code == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", ""))
        if not extent:
            raise AddressError(f"the server sent a part without saying which: {response.headers.get('content-range')!r}")
        return int(extent[1]), None if extent[2] == "*" else int(extent[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdigit() else None


def _validator(response: httpx.Response) -> str | None:
    """What names this version of the file in If-Range: a strong ETag, or the date (RFC 9110, 13.1.5)."""
    tag = response.headers.get("etag", "")
    return tag if tag.startswith('"') else response.headers.get("last-modified")


# -- Google Drive's confirmation page ------------------------------------------------------------------------------


class _Page(HTMLParser):
    """The title, forms and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.title, self._in_title = "", False
        self.forms: list[tuple[str, dict[str, str]]] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append((given.get("action", ""), {}))
        elif tag == "input" and self.forms and given.get("name"):
            self.forms[-1][1][given["name"]] = given.get("value", "")
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data


def _confirmed(client: httpx.Client, url: str) -> str:
    """The address behind the confirmation page at `url`, or `url` itself where the file comes at once."""
    with client.stream("GET", url) as response:
        _check_status(response)
        if not _is_page(response):
            return url
        text, shown_at = _page(response), str(response.url)
    page = _Page(text)
    for action, fields in page.forms:
        if "confirm" in fields:
            return _trusted(url, f"{urljoin(shown_at, action)}?{urlencode(fields)}")
    for link in page.links:
        if re.search(r"[?&]confirm=", link):
            return _trusted(url, urljoin(shown_at, link))
    raise AddressError(f"a web page instead of the file, and no way to confirm on it: {_page_title(text)}")


def _trusted(url: str, target: str) -> str:
    """`target`, if it is on the host of `url` or both are Google's."""
    hosts = [urlsplit(address).hostname or "" for address in (url, target)]
    is_google = [host.endswith((".google.com", ".googleusercontent.com")) for host in hosts]
    if hosts[0] != hosts[1] and not all(is_google):
        raise AddressError(f"the confirmation page leads to another host: {hosts[1]}")
    return target


def _page(response: httpx.Response) -> str:
    content = b""
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > LARGEST_PAGE_BYTES:
            break
    return content.decode("utf-8", "replace")


def _page_title(text: str) -> str:
    return repr(" ".join(_Page(text).title.split())[:120] or text[:60])
