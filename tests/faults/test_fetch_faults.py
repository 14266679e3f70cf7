"""Fetching from servers, disks and neighbours that misbehave; every server here is a real one on the loopback."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from bench.data.download import Patience, discard_part
from bench.data.fetch import fetch, verify
from bench.data.manifest import load_manifest
from bench.data.sources import Source
from bench.errors import DataError, MachineError, UserError

HASTY = Patience(connect_seconds=5, stall_seconds=1.5, total_seconds=60, fruitless_tries=3, pause_seconds=0.01, longest_pause_seconds=0.02)
ROOT = Path(__file__).resolve().parents[2]


def content(rows: int = 2000, word: str = "one") -> bytes:
    return b"".join(
        json.dumps({"instruction": f"Say {word} {number}", "input": "", "output": "x" * 60}).encode() + b"\n" for number in range(rows)
    )


GOOD = content()
OTHER = content(word="two")


class Server:
    """Serves `body` at every path; `answers` (one a request, then the default) may do something else."""

    def __init__(self, body: bytes = GOOD, etag: str | None = '"v1"') -> None:
        self.body, self.etag = body, etag
        self.answers: list[Callable[[Any], None]] = []
        self.requests: list[tuple[str, str | None]] = []
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_state = outer

            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                answer = outer.answers.pop(0) if outer.answers else send_file
                try:
                    answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *args: object) -> None: ...

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.thread = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()
        self.thread.join()


def start(handler: Any, code: int, **headers: object) -> None:
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def write(handler: Any, data: bytes) -> None:
    handler.wfile.write(data)
    handler.server_state.sent += len(data)


def send_file(handler: Any, upto: int | None = None) -> None:
    """As a good server does: Range with If-Range. With `upto`, the connection is cut after that many bytes."""
    state = handler.server_state
    body, begin = state.body, 0
    asked = handler.headers.get("Range")
    tag = {"ETag": state.etag} if state.etag else {}
    if asked and state.etag and handler.headers.get("If-Range", state.etag) == state.etag:
        begin = int(asked.removeprefix("bytes=").rstrip("-"))
        if begin >= len(body):
            start(handler, 416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
            return
    if begin:
        start(handler, 206, Content_Length=len(body) - begin, Content_Range=f"bytes {begin}-{len(body) - 1}/{len(body)}", **tag)
    else:
        start(handler, 200, Content_Length=len(body), **tag)
    write(handler, body[begin:] if upto is None else body[begin : begin + upto])
    if upto is not None:
        handler.wfile.flush()
        handler.close_connection = True


def cut(upto: int) -> Callable[[Any], None]:
    return lambda handler: send_file(handler, upto)


def status(code: int) -> Callable[[Any], None]:
    return lambda handler: start(handler, code, Content_Length=0)


def page(html: str, **headers: object) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        start(handler, 200, **{"Content_Type": "text/html; charset=utf-8", "Content_Length": len(html.encode()), **headers})
        write(handler, html.encode())

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def second() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source(*urls: str, **changes: Any) -> Source:
    facts = {"sha256": sha(GOOD), "sha256_verified": True, "bytes": len(GOOD), "rows": 2000} | changes
    return Source(
        name="wild",
        kind="instruct",
        title="A set",
        urls=urls,
        file_name="wild.json",
        licence="For tests only.",
        format="json lines",
        **facts,
    )


def unpublished(*urls: str) -> Source:
    return source(*urls, sha256=None, sha256_verified=False, bytes=None, rows=None)


def get(what: Source, cache: Path, **options: Any) -> Any:
    return fetch(what, cache=cache, **({"patience": HASTY} | options))


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "wild").iterdir()) if (cache / "wild").exists() else []


def is_whole(cache: Path, data: bytes = GOOD) -> bool:
    return (cache / "wild" / "wild.json").read_bytes() == data and files(cache) == ["wild.json", "wild.json.manifest.json"]


# -- connections that break ----------------------------------------------------------------------------------------


def test_a_truncated_download_is_resumed_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.answers = [cut(100_000), cut(50_000)]
    manifest = get(source(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert server.sent == len(GOOD)
    assert (manifest.rows, manifest.sha256, manifest.sha256_status) == (2000, sha(GOOD), "published")


def test_a_server_that_falls_silent_is_asked_again(server: Server, tmp_path: Path) -> None:
    def stall(handler: Any) -> None:
        send_file(handler, 80_000)
        time.sleep(6)

    server.answers = [stall]
    begun = time.monotonic()
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert server.requests[1][1] == "bytes=80000-"
    assert time.monotonic() - begun < 6


def test_a_trickle_ends_at_the_total_time_limit_and_what_came_is_kept(server: Server, tmp_path: Path) -> None:
    def trickle(handler: Any) -> None:
        start(handler, 200, Content_Length=len(GOOD), ETag='"v1"')
        for at in range(0, len(GOOD), 100):
            write(handler, GOOD[at : at + 100])
            time.sleep(0.05)

    server.answers = [trickle]
    patience = Patience(stall_seconds=5, total_seconds=0.5, fruitless_tries=2, pause_seconds=0.01)
    with pytest.raises(MachineError, match=r"not whole after 0.5 seconds \(\d+ bytes have arrived and are kept\)"):
        get(source(f"{server.url}/wild.json"), tmp_path, patience=patience)
    [part] = (tmp_path / "wild").glob("*.part")
    assert 0 < part.stat().st_size < len(GOOD)
    assert GOOD.startswith(part.read_bytes())


def test_server_errors_pass(server: Server, tmp_path: Path) -> None:
    server.answers = [status(503), status(500)]
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert len(server.requests) == 3


def test_server_errors_that_do_not_pass_end_the_tries(server: Server, tmp_path: Path) -> None:
    server.answers = [status(503)] * 10
    with pytest.raises(MachineError, match=r"503 Service Unavailable \(3 tries\)\n.*--from FOLDER"):
        get(source(f"{server.url}/wild.json"), tmp_path)
    assert len(server.requests) == HASTY.fruitless_tries


def test_tries_that_bring_bytes_are_not_counted(server: Server, tmp_path: Path) -> None:
    server.answers = [cut(20_000)] * 8
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert len(server.requests) == 9 > HASTY.fruitless_tries


def test_a_machine_without_network_says_so(tmp_path: Path) -> None:
    gone = Server()
    gone.close()
    with pytest.raises(MachineError, match=r"data 'wild': no address gave it:\n  http.*refused.*\n.*use --from FOLDER"):
        get(source(f"{gone.url}/wild.json"), tmp_path)


def test_a_missing_file_is_not_asked_for_twice(server: Server, tmp_path: Path) -> None:
    server.answers = [status(404)]
    with pytest.raises(DataError, match="404 Not Found"):
        get(source(f"{server.url}/wild.json"), tmp_path)
    assert len(server.requests) == 1


def test_the_next_address_is_tried(server: Server, second: Server, tmp_path: Path) -> None:
    server.answers = [status(404)]
    manifest = get(source(f"{server.url}/wild.json", f"{second.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert manifest.source == f"{second.url}/wild.json"


def test_trying_a_mirror_does_not_lose_what_another_sent(server: Server, second: Server, tmp_path: Path) -> None:
    both = source(f"{server.url}/wild.json", f"{second.url}/wild.json")
    server.answers = [cut(100_000), status(500), status(500), status(500)]
    second.answers = [status(404)]
    with pytest.raises(DataError):
        get(both, tmp_path)
    get(both, tmp_path)
    assert server.requests[-1][1] == "bytes=100000-"
    assert is_whole(tmp_path)


def test_redirects_are_followed_and_keep_the_range(server: Server, second: Server, tmp_path: Path) -> None:
    def away(handler: Any) -> None:
        start(handler, 302, Location=f"{second.url}/blob", Content_Length=0)

    server.answers = [away, away]
    second.answers = [cut(90_000)]
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert second.requests == [("/blob", None), ("/blob", "bytes=90000-")]


def test_a_redirect_loop_ends(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda handler: start(handler, 302, Location="/again", Content_Length=0)] * 30
    with pytest.raises(DataError, match="redirect"):
        get(source(f"{server.url}/wild.json"), tmp_path)


# -- servers that send something else ------------------------------------------------------------------------------


def test_wrong_bytes_are_refused_and_leave_nothing(server: Server, tmp_path: Path) -> None:
    server.body = GOOD[:-2] + b" \n"
    with pytest.raises(DataError, match=f"wrong content: sha256 {sha(server.body)}; published is {sha(GOOD)}"):
        get(source(f"{server.url}/wild.json"), tmp_path)
    assert files(tmp_path) == []


def test_a_file_of_another_size_is_refused_before_it_is_loaded(server: Server, tmp_path: Path) -> None:
    server.body = GOOD * 3
    with pytest.raises(DataError, match=f"the server has a file of {len(GOOD) * 3} bytes; the right one has {len(GOOD)}"):
        get(source(f"{server.url}/wild.json"), tmp_path)


def test_wrong_bytes_at_one_address_do_not_stop_the_next(server: Server, second: Server, tmp_path: Path) -> None:
    server.body = OTHER
    get(source(f"{server.url}/wild.json", f"{second.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)


def test_a_server_that_ignores_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    def whole(handler: Any) -> None:
        start(handler, 200, Content_Length=len(GOOD), ETag='"v1"')
        write(handler, GOOD)

    server.answers = [cut(100_000), whole]
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert server.requests[1][1] == "bytes=100000-"
    assert is_whole(tmp_path)


def test_a_file_that_changes_between_tries_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    def change(handler: Any) -> None:
        send_file(handler, 100_000)
        server.body, server.etag = OTHER, '"v2"'

    server.answers = [change]
    manifest = get(unpublished(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path, OTHER)
    assert manifest.sha256 == sha(OTHER)
    assert len(server.requests) == 2, "If-Range makes the server send the whole new file at once"


def test_a_server_that_continues_another_version_is_not_believed(server: Server, tmp_path: Path) -> None:
    def continue_other(handler: Any) -> None:
        begin, size = 100_000, len(OTHER)
        start(handler, 206, Content_Length=size - begin, Content_Range=f"bytes {begin}-{size - 1}/{size}", ETag='"v2"')
        write(handler, OTHER[begin:])

    server.answers = [cut(100_000), continue_other]
    get(unpublished(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)


def test_two_halves_of_different_files_are_found_out_and_loaded_again(server: Server, tmp_path: Path) -> None:
    address = f"{server.url}/wild.json"
    server.answers = [cut(100_000), status(404)]
    with pytest.raises(DataError):
        get(source(address), tmp_path)
    [part] = (tmp_path / "wild").glob("*.part")
    part.write_bytes(OTHER[:100_000])
    get(source(address), tmp_path)
    assert is_whole(tmp_path)
    assert [asked for _, asked in server.requests[2:]] == ["bytes=100000-", None]


def test_a_part_that_is_whole_already_is_not_loaded_again(server: Server, tmp_path: Path) -> None:
    def send_all_then_never_end(handler: Any) -> None:
        start(handler, 200, ETag='"v1"', Transfer_Encoding="chunked")
        handler.wfile.write(f"{len(GOOD):x}\r\n".encode() + GOOD + b"\r\n")
        handler.close_connection = True

    server.answers = [send_all_then_never_end]
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert is_whole(tmp_path)
    assert server.requests[1][1] == f"bytes={len(GOOD)}-"
    assert server.sent == 0


def test_a_server_that_does_not_say_the_size_is_checked_by_the_stated_one(server: Server, tmp_path: Path) -> None:
    def stop_early(handler: Any) -> None:
        start(handler, 200, ETag='"v1"', Connection="close")
        write(handler, GOOD[:100_000])
        handler.close_connection = True

    server.answers = [stop_early]
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert server.requests[1][1] == "bytes=100000-"
    assert is_whole(tmp_path)


def test_a_server_without_version_marks_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.etag = None
    server.answers = [cut(100_000)]
    get(source(f"{server.url}/wild.json"), tmp_path)
    assert server.requests[1][1] is None
    assert is_whole(tmp_path)


def test_a_compressed_transfer_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [page("abc", Content_Type="application/json", Content_Encoding="gzip")]
    with pytest.raises(DataError, match="compresses the transfer"):
        get(source(f"{server.url}/wild.json"), tmp_path)


# -- pages instead of data -----------------------------------------------------------------------------------------

FORM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="/download" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="F1"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a-b-c"></form></body></html>"""


def drive(server: Server) -> Source:
    return source(f"drive+{server.url}/uc?export=download&id=F1")


def test_the_confirmation_page_is_confirmed(server: Server, tmp_path: Path) -> None:
    server.answers = [page(FORM)]
    get(drive(server), tmp_path)
    assert [path for path, _ in server.requests] == ["/uc?export=download&id=F1", "/download?id=F1&export=download&confirm=t&uuid=a-b-c"]
    assert is_whole(tmp_path)


def test_a_download_behind_the_confirmation_page_is_resumed(server: Server, tmp_path: Path) -> None:
    server.answers = [page(FORM), cut(100_000), page(FORM.replace("a-b-c", "d-e-f"))]
    get(drive(server), tmp_path)
    assert server.requests[-1] == ("/download?id=F1&export=download&confirm=t&uuid=d-e-f", "bytes=100000-")
    assert is_whole(tmp_path)


def test_the_older_confirmation_link_is_followed(server: Server, tmp_path: Path) -> None:
    server.answers = [page('<a id="uc-download-link" href="/uc?export=download&amp;confirm=XyZ&amp;id=F1">Download anyway</a>')]
    get(drive(server), tmp_path)
    assert server.requests[1][0] == "/uc?export=download&confirm=XyZ&id=F1"
    assert is_whole(tmp_path)


def test_a_small_file_comes_without_a_confirmation_page(server: Server, tmp_path: Path) -> None:
    get(drive(server), tmp_path)
    assert is_whole(tmp_path)


def test_a_confirmation_that_leads_to_another_host_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [page(FORM.replace('action="/download"', 'action="https://elsewhere.example/download"'))]
    with pytest.raises(DataError, match=r"leads to another host: elsewhere\.example"):
        get(drive(server), tmp_path)


def test_a_quota_page_is_told_by_its_title(server: Server, tmp_path: Path) -> None:
    server.answers = [page("<html><title>Google Drive - Quota exceeded</title><p>Too many users</p></html>")]
    with pytest.raises(DataError, match=r"a web page instead of the file.*'Google Drive - Quota exceeded'"):
        get(drive(server), tmp_path)


@pytest.mark.parametrize("label", ["text/html", "application/octet-stream"])
@pytest.mark.parametrize("accepted", [False, True])
def test_a_web_page_is_never_data(server: Server, tmp_path: Path, label: str, accepted: bool) -> None:
    html = "\n<html><title>Sign in</title></html>"
    server.answers = [page(html, Content_Type=label)]
    with pytest.raises(DataError, match=r"a web page instead of the file|an HTML or XML page, not data"):
        get(unpublished(f"{server.url}/wild.json"), tmp_path, accept_sha256=sha(html.encode()) if accepted else None)
    assert "wild.json" not in files(tmp_path)
    assert not (tmp_path / "wild.lock.json").exists()


# -- hashes that nobody publishes ----------------------------------------------------------------------------------


def test_the_first_fetch_locks_what_later_ones_must_match(server: Server, tmp_path: Path) -> None:
    what = unpublished(f"{server.url}/wild.json")
    first = get(what, tmp_path)
    assert first.sha256_status == "locked at the first fetch"
    lock = json.loads((tmp_path / "wild.lock.json").read_text())
    assert (lock["sha256"], lock["bytes"], lock["url"]) == (sha(GOOD), len(GOOD), f"{server.url}/wild.json")
    assert lock["date"] == first.fetched

    (tmp_path / "wild" / "wild.json").unlink()
    server.body, server.etag = OTHER, '"v2"'
    with pytest.raises(DataError, match=f"not what was fetched before: sha256 {sha(OTHER)}; .*wild.lock.json has {sha(GOOD)}"):
        get(what, tmp_path)
    assert "wild.json" not in files(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"sha256": null}', '{"sha256": "none"}'])
def test_a_lock_that_is_damaged_is_not_ignored(server: Server, tmp_path: Path, text: str) -> None:
    what = unpublished(f"{server.url}/wild.json")
    (tmp_path / "wild.lock.json").write_text(text)
    with pytest.raises(DataError, match="not a lock of a data set"):
        get(what, tmp_path)


def test_a_hash_that_a_mirror_states_is_no_proof_but_the_user_may_accept(server: Server, tmp_path: Path) -> None:
    what = source(f"{server.url}/wild.json", sha256=sha(OTHER), sha256_verified=False)
    with pytest.raises(
        DataError, match=f"sha256 {sha(GOOD)}; a mirror states {sha(OTHER)}, but upstream publishes none.*--accept-sha256 {sha(GOOD)}"
    ):
        get(what, tmp_path)
    assert files(tmp_path) == ["wild.json.unaccepted"]
    accepted = get(what, tmp_path, accept_sha256=sha(GOOD).upper())
    assert len(server.requests) == 1, "what was fetched before is used"
    assert is_whole(tmp_path)
    assert accepted.sha256_status == "accepted by the user"
    assert get(what, tmp_path).sha256_status == "accepted by the user"
    assert len(server.requests) == 1


def test_a_stated_hash_that_fits_is_recorded_as_a_mirrors(server: Server, tmp_path: Path) -> None:
    assert get(source(f"{server.url}/wild.json", sha256_verified=False), tmp_path).sha256_status == "stated by a mirror"


def test_a_published_hash_cannot_be_overridden(server: Server, tmp_path: Path) -> None:
    server.body, server.etag = OTHER, '"v2"'
    with pytest.raises(DataError, match="published is"):
        get(source(f"{server.url}/wild.json"), tmp_path, accept_sha256=sha(OTHER))


def test_accepting_one_content_does_not_accept_another(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"--accept-sha256 asked for {'a' * 64}"):
        get(unpublished(f"{server.url}/wild.json"), tmp_path, accept_sha256="a" * 64)
    with pytest.raises(UserError, match="--accept-sha256 beef: not a sha256"):
        get(unpublished(f"{server.url}/wild.json"), tmp_path, accept_sha256="beef")


# -- what is here already ------------------------------------------------------------------------------------------


def test_what_is_here_and_verified_needs_no_network(server: Server, tmp_path: Path) -> None:
    for what in (source(f"{server.url}/wild.json"), unpublished(f"{server.url}/wild.json")):
        first = get(what, tmp_path)
        asked = len(server.requests)
        assert get(what, tmp_path) == first
        assert len(server.requests) == asked


def test_a_file_that_was_damaged_here_is_fetched_again(server: Server, tmp_path: Path) -> None:
    what = source(f"{server.url}/wild.json")
    get(what, tmp_path)
    path = tmp_path / "wild" / "wild.json"
    path.write_bytes(GOOD[:1000])
    with pytest.raises(DataError, match="has changed"):
        verify(what, cache=tmp_path)
    said: list[str] = []
    get(what, tmp_path, say=said.append)
    assert is_whole(tmp_path)
    assert "fetching it again" in said[0]
    assert verify(what, cache=tmp_path).sha256 == sha(GOOD)


def test_a_lost_manifest_is_made_again_without_network(server: Server, tmp_path: Path) -> None:
    what = source(f"{server.url}/wild.json")
    get(what, tmp_path)
    (tmp_path / "wild" / "wild.json.manifest.json").write_text("{}")
    get(what, tmp_path)
    assert len(server.requests) == 1
    assert load_manifest(tmp_path / "wild" / "wild.json.manifest.json").rows == 2000


def test_verifying_what_was_never_fetched_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`coati-bench data fetch wild` brings it"):
        verify(source("http://127.0.0.1:9/wild.json"), cache=tmp_path)


# -- processes, disks ----------------------------------------------------------------------------------------------

CLIENT = """
import json, sys
from pathlib import Path
from bench.data.download import Patience
from bench.data.fetch import fetch
from bench.data.sources import Source
facts = json.loads(sys.argv[1])
source = Source(name="wild", kind="instruct", title="A set", file_name="wild.json", licence="For tests only.", format="json lines",
                **{**facts, "urls": tuple(facts["urls"])})
print(fetch(source, cache=Path(sys.argv[2]), patience=Patience(pause_seconds=0.01)).sha256)
"""


def client(what: Source, cache: Path) -> subprocess.Popen[str]:
    facts = {"urls": what.urls, "sha256": what.sha256, "sha256_verified": what.sha256_verified, "bytes": what.bytes}
    command = [sys.executable, "-c", CLIENT, json.dumps(facts), str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_client_that_is_killed_resumes_with_fewer_bytes(server: Server, tmp_path: Path, wait_until: Callable[..., bool]) -> None:
    killed = threading.Event()

    def half(handler: Any) -> None:
        start(handler, 200, Content_Length=len(GOOD), ETag='"v1"')
        write(handler, GOOD[:120_000])
        killed.wait(60)

    server.answers = [half]
    what = source(f"{server.url}/wild.json")
    process = client(what, tmp_path)
    try:
        assert wait_until(lambda: any(part.stat().st_size >= 100_000 for part in (tmp_path / "wild").glob("*.part")), 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.set()
    assert process.returncode == -signal.SIGKILL
    assert "wild.json" not in files(tmp_path)
    [part] = (tmp_path / "wild").glob("*.part")
    arrived = part.stat().st_size
    assert arrived >= 100_000

    server.sent = 0
    manifest = get(what, tmp_path)
    assert manifest.sha256 == sha(GOOD)
    assert is_whole(tmp_path)
    assert server.requests[-1][1] == f"bytes={arrived}-"
    assert server.sent == len(GOOD) - arrived


def test_two_processes_that_fetch_at_once_load_it_once(server: Server, tmp_path: Path) -> None:
    def slowly(handler: Any) -> None:
        time.sleep(0.5)
        send_file(handler)

    server.answers = [slowly]
    what = source(f"{server.url}/wild.json")
    processes = [client(what, tmp_path) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [(process.returncode, out.strip()) for process, (out, _) in zip(processes, results, strict=True)] == [(0, sha(GOOD))] * 3
    assert len(server.requests) == 1
    assert is_whole(tmp_path)


def test_a_full_disk_is_told_and_the_next_try_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = source(f"{server.url}/wild.json")
    real_open = Path.open

    class Full:
        """A file on a disk that has room for 50,000 bytes more."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() + len(data) > 50_000:
                self.file.write(data[: 50_000 - self.file.tell()])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def limited(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        return Full(file) if mode == "ab" else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", limited)
        with pytest.raises(MachineError, match="No space left on device; free some space, or use another disk"):
            get(what, tmp_path)
    assert "wild.json" not in files(tmp_path)
    get(what, tmp_path)
    assert server.requests[-1][1] == "bytes=50000-"
    assert is_whole(tmp_path)


def test_a_device_without_space_is_the_machines_fault(server: Server, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    what = source(f"{server.url}/wild.json")
    server.answers = [cut(1000), status(404)]
    with pytest.raises(DataError):
        get(what, tmp_path)
    [part] = (tmp_path / "wild").glob("*.part")
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(MachineError, match="No space left on device"):
        get(what, tmp_path)
    discard_part(part)
    get(what, tmp_path)
    assert is_whole(tmp_path)


def test_a_file_larger_than_the_disk_is_not_begun(server: Server, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"\d+ more bytes are needed, \d+ are free"):
        get(source(f"{server.url}/wild.json", bytes=1 << 60), tmp_path)
    assert server.requests == []


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory; use a folder that can be written"):
        get(source(f"{server.url}/wild.json"), tmp_path / "file")
    assert server.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_is_the_users_to_mend(server: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        get(source(f"{server.url}/wild.json"), tmp_path)


# -- copies and mirrors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_offline_copy_is_checked_and_copied(tmp_path: Path, form: str) -> None:
    copy = tmp_path / "usb" / ("wild.json" if form == "folder" else "renamed.txt")
    copy.parent.mkdir()
    copy.write_bytes(GOOD)
    manifest = get(source("http://127.0.0.1:9/wild.json"), tmp_path / "cache", from_=str(copy.parent if form == "folder" else copy))
    assert is_whole(tmp_path / "cache")
    assert manifest.source == str(copy)
    assert copy.read_bytes() == GOOD


def test_a_wrong_offline_copy_is_refused_and_left_alone(tmp_path: Path) -> None:
    copy = tmp_path / "wild.json"
    copy.write_bytes(OTHER)
    with pytest.raises(DataError, match="published is"):
        get(source("http://127.0.0.1:9/wild.json"), tmp_path / "cache", from_=str(tmp_path))
    assert files(tmp_path / "cache") == []
    assert copy.exists()


def test_a_folder_without_the_file_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*/wild\.json; give a folder that has wild\.json"):
        get(source("http://127.0.0.1:9/wild.json"), tmp_path / "cache", from_=str(tmp_path))


@pytest.mark.parametrize("suffix", ["/data", "/data/", "/data/wild.json"])
def test_a_mirror_is_used_instead_of_the_sources_addresses(server: Server, tmp_path: Path, suffix: str) -> None:
    get(source("http://127.0.0.1:9/wild.json"), tmp_path, from_=server.url + suffix)
    assert server.requests == [("/data/wild.json", None)]
    assert is_whole(tmp_path)


# -- what the manifest says ----------------------------------------------------------------------------------------


def test_malformed_rows_are_counted_exactly_and_named_by_line(server: Server, tmp_path: Path) -> None:
    lines = GOOD.splitlines(keepends=True)[:500]
    lines[6] = b'{"instruction": "cut off\n'
    lines[9] = b'{"instruction": "no output"}\n'
    server.body = b"".join(lines) + b"nonsense\n" * 150
    manifest = get(unpublished(f"{server.url}/wild.json"), tmp_path)
    assert (manifest.rows, manifest.rejected_count, len(manifest.rejected)) == (498, 152, 100)
    assert [(row.line, row.reason.split(";")[0]) for row in manifest.rejected[:2]] == [
        (7, "not JSON: Unterminated string starting at at column 17"),
        (10, "no field 'output'"),
    ]
    assert load_manifest(tmp_path / "wild" / "wild.json.manifest.json") == manifest
    assert manifest.as_input().facts["rejected"] == 152


def test_another_number_of_rows_than_stated_is_noted(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = get(source(f"{server.url}/wild.json", rows=1999), tmp_path, say=said.append)
    assert manifest.notes == ["the source states 1999 rows; the file has 2000"]
    assert said[0] == "wild: A set. Licence: For tests only."
    assert said[-1] == "wild: the source states 1999 rows; the file has 2000"


def test_progress_tells_bytes_and_size(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    get(source(f"{server.url}/wild.json"), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(GOOD), len(GOOD))
