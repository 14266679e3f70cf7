"""From what was seen of a try to its outcome."""

from __future__ import annotations

import pytest

from bench.launch.classify import NETWORK, Seen, classify
from bench.launch.rank import RankProcess
from bench.launch.watch import Place, Watched
from bench.record import Part
from bench.suite import Limits


def part(rank: int, outcome: str = "ok", reason: str | None = None, step: int = 0, phase: str = "train") -> Part:
    return Part(
        rank=rank, local_rank=rank, node=0, world_size=2, hostname="h", pid=1, outcome=outcome, reason=reason, phase=phase, step=step
    )


def seen(
    codes: dict[int, int | None] | None = None, *, end: str = "ended", parts: tuple[Part, ...] = (), silent: int | None = None, **more
) -> Seen:
    codes = {0: 0, 1: 0} if codes is None else codes
    order = list(codes)
    processes = {
        rank: RankProcess(rank=rank, pid=rank + 10, hostname="h", code=code, ended=None if code is None else 100.0 + order.index(rank))
        for rank, code in codes.items()
    }
    watched = Watched(end=end, seconds=1.0, silent_rank=silent, processes=processes, places=more.pop("places", {}))
    return Seen(world_size=2, limits=Limits(), watched=watched, parts={item.rank: item for item in parts}, **more)


BOTH = (part(0), part(1))


def test_all_parts_ok_and_all_codes_zero_is_ok():
    assert classify(seen(parts=BOTH)) == ("ok", None, False)


def test_an_interrupt_comes_before_everything_that_it_caused():
    verdict = classify(seen({0: -15, 1: -15}, cancelled="SIGTERM", parts=(part(0, "oom"),)))
    assert (verdict.outcome, verdict.incident) == ("cancelled", False)


@pytest.mark.parametrize(
    ("first", "second", "expected"), [("diverged", "oom", "oom"), ("oom", "invalid", "invalid"), ("error", "diverged", "diverged")]
)
def test_of_what_ranks_say_the_gravest_decides(first, second, expected):
    assert classify(seen({0: 1, 1: 1}, parts=(part(0, first), part(1, second)))).outcome == expected


def test_a_rank_out_of_memory_explains_the_broken_links_of_the_others():
    logs = {0: "RuntimeError: Connection closed by peer"}
    verdict = classify(seen({0: 1, 1: 75}, parts=(part(0, "error"), part(1, "oom", "requested 10 bytes")), logs=logs))
    assert (verdict.outcome, verdict.incident) == ("oom", False)
    assert "rank 1" in verdict.reason


def test_a_kill_is_out_of_memory_only_if_the_kernel_says_so():
    assert classify(seen({1: -9, 0: 1}, oom_kills=1)).outcome == "oom"
    assert classify(seen({1: -9, 0: 1}, oom_kills=0)).outcome == "error"


def test_a_kill_by_the_supervisor_is_no_sign_of_memory():
    verdict = classify(seen({0: None, 1: None}, end="silent", silent=1, oom_kills=1, places={1: Place("train", 7)}))
    assert verdict == ("timeout", "rank 1 was silent for more than 300 s (phase train, step 7)", False)


def test_memory_errors_in_logs_count_only_where_no_part_tells_better():
    assert classify(seen({0: 0, 1: 1}, logs={1: "MemoryError"}, parts=(part(0),))).outcome == "oom"
    told = (part(0), part(1, "error", "ValueError: no such row"))
    assert classify(seen({0: 0, 1: 1}, logs={1: "MemoryError"}, parts=told)).outcome == "error"


def test_a_timeout_names_the_ranks_that_ran_on():
    verdict = classify(seen({0: 0, 1: None}, end="timeout", places={0: Place("done", 9), 1: Place("load", 0)}))
    assert verdict.reason == "longer than 3600 s (rank 1: phase load, step 0)"


def test_the_first_rank_to_fail_is_named():
    verdict = classify(seen({1: 3, 0: 1}, logs={0: "later", 1: "sooner"}))
    assert verdict.reason == "rank 1 ended with exit code 3 (phase start, step 0):\nsooner"


def test_a_broken_link_before_the_first_step_is_an_incident_and_after_it_is_not():
    logs = dict.fromkeys((0, 1), "torch.distributed.DistNetworkError: The client socket has failed to connect to 127.0.0.1:29500")
    assert classify(seen({0: 1, 1: 1}, logs=logs)).incident
    assert not classify(seen({0: 1, 1: 1}, logs=logs, places={0: Place("train", 1)})).incident


def test_a_broken_link_that_another_failure_explains_is_no_incident():
    assert not classify(seen({1: 3, 0: 1}, logs={0: "Connection reset by peer", 1: "ValueError: bad row"})).incident


def test_ranks_that_torchrun_ended_do_not_hide_a_broken_link():
    logs = {0: "Connection refused", 1: ""}
    assert classify(seen({0: 1, 1: -15}, logs=logs)).incident


def test_trouble_of_the_launcher_before_the_first_step_is_an_incident():
    verdict = classify(seen({}, trouble="the torchrun agent of node 0 ended with exit code 1", launcher_log="EADDRINUSE"))
    assert verdict == ("error", "the torchrun agent of node 0 ended with exit code 1:\nEADDRINUSE", True)


def test_a_failed_rank_comes_before_the_agent_that_it_took_with_it():
    assert classify(seen({0: 3}, trouble="the torchrun agent of node 0 ended with exit code 1")).reason.startswith("rank 0")


def test_missing_parts_are_named_with_a_full_disk_as_cause():
    verdict = classify(seen(parts=(part(0),), space="no space is left for /x"))
    assert verdict == ("error", "no part was left by rank 1; no space is left for /x", False)


def test_a_part_that_says_error_is_believed_even_with_exit_code_0():
    assert classify(seen(parts=(part(0), part(1, "error", "lost")))).reason == "rank 1, phase train, step 0: lost"


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2345",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. EADDRINUSE",
        "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "RuntimeError: Gloo connectFullMesh failed with no error",
        "socket.gaierror: [Errno -3] Temporary failure in name resolution",
    ],
)
def test_messages_of_broken_links_are_known(text):
    assert NETWORK.search(text)


@pytest.mark.parametrize(
    "text", ["ValueError: bad row", "CUDA error: an illegal memory access", "KeyError: 'connection'", "ncclInvalidUsage"]
)
def test_messages_of_other_failures_are_not_taken_for_broken_links(text):
    assert not NETWORK.search(text)
