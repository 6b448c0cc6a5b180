"""How ranks meet and part: the backend, the store of one attempt, and the process group at the end."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.distributed import DistError, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from metatt_scale.parallel import join, meeting
from tests.toy import CPU

GPU = torch.device("cuda", 1)
HERE = "127.0.0.1"


# ---- the process group


@pytest.mark.parametrize(
    "device, size, cpu_tensors, expected",
    [
        (CPU, 2, False, {"backend": "gloo"}),
        (CPU, 1, True, {"backend": "gloo"}),
        (GPU, 8, False, {"backend": "nccl", "device_id": GPU}),
        (GPU, 8, True, {"backend": "cpu:gloo,cuda:nccl", "device_id": GPU}),
        (GPU, 1, False, {"backend": "nccl"}),
        (GPU, 1, True, {"backend": "cpu:gloo,cuda:nccl"}),
    ],
)
def test_gloo_is_there_only_where_cpu_tensors_travel(device, size, cpu_tensors, expected):
    assert meeting.group_options(device, size, cpu_tensors=cpu_tensors) == expected


@pytest.fixture
def group(monkeypatch):
    """Stand in for the process group: a function that joins a world of `size`, and the list of what was done."""
    done = []
    monkeypatch.setattr(distributed, "init_process_group", lambda **options: done.append(options))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(meeting, "_store", lambda *_: None)
    monkeypatch.setattr(meeting, "_uuid", lambda _: "")

    def start(size, **options):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": HERE, "MASTER_PORT": "29500"}
        for name, value in (place if size > 1 else {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORLD_SIZE", str(size))
        return join(GPU, timedelta(seconds=5), group=True, **options)

    return start, done


@pytest.mark.parametrize("size, left", [(1, ["destroyed"]), (2, [])])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_rank_waits_for_nobody(group, size, left, error):
    """NCCL would wait for the others to leave the group; alone there is nobody, and the next `join` needs it gone."""
    start, done = group
    with pytest.raises(error), start(size):
        raise error
    assert done[1:] == left


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("cpu_tensors", [False, True])
def test_a_rank_that_succeeds_leaves_the_group(group, size, cpu_tensors):
    start, done = group
    with start(size, cpu_tensors=cpu_tensors) as world:
        assert (world.size, world.device) == (size, GPU)
    options, *rest = done
    assert rest == ["destroyed"] and options["world_size"] == size
    for name, value in meeting.group_options(GPU, size, cpu_tensors=cpu_tensors).items():
        assert options[name] == value


# ---- the store of one attempt, on stores of this process


@pytest.fixture
def agent():
    """The store that torchrun's agent keeps for all attempts."""
    server = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)

    def client():
        return PrefixStore("group 0", TCPStore(HERE, server.port, is_master=False, timeout=timedelta(seconds=20)))

    return client


@pytest.mark.parametrize("count, longer", [("0", timedelta()), ("1", timedelta(minutes=10))])
def test_restarted_ranks_wait_longer_for_each_other(monkeypatch, count, longer):
    """Those of other nodes may notice late; afterwards the time-out is the one that was asked for."""
    server, waits = TCPStore(HERE, 0, is_master=True, wait_for_workers=False), []
    place = {"MASTER_ADDR": HERE, "MASTER_PORT": str(server.port), "TORCHELASTIC_RESTART_COUNT": count}
    for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "meet", lambda *arguments: waits.append(arguments[-1]) or server)
    store = meeting._store(1, 2, timedelta(seconds=7))
    assert waits == [timedelta(seconds=7) + longer] and store.timeout == timedelta(seconds=7)


@pytest.fixture
def rank(agent, monkeypatch):
    """Start a rank that meets the other one, as a process of its own would."""
    monkeypatch.setattr(meeting, "_PAUSE", 0.1)
    with ThreadPoolExecutor() as pool:
        yield lambda number, seconds=20.0: pool.submit(
            meeting.meet, agent(), HERE, number, 2, timedelta(seconds=seconds)
        )


def give_time():
    """Let a rank come to a wrong store, if it does."""
    time.sleep(0.3)


def are_together(one, other):
    """Whether two ranks have come to the same store."""
    one.result(20).set("written by one", "x")
    return other.result(20).check(["written by one"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_ranks_meet_in_a_store_of_their_own(rank, agent, order):
    first, second = (rank(number) for number in order)
    assert are_together(first, second) and not agent().check(["written by one"])


def test_a_restarted_rank_does_not_come_to_the_store_of_the_last_attempt(rank):
    """Rank 1 is restarted at once, rank 0 notices later: whatever their agents count, they meet when both are new."""
    old = rank(0), rank(1)
    assert are_together(*old)
    new = rank(1)
    give_time()
    assert not new.done()
    assert are_together(rank(0), new)
    assert new.result().port != old[1].result().port


def test_rank_0_may_be_the_first_to_come_back(rank):
    old = rank(0), rank(1)
    assert are_together(*old)
    new = rank(0)
    give_time()
    assert not new.done()
    assert are_together(new, rank(1))


def test_a_store_that_is_gone_or_of_another_job_is_passed_over(rank, agent):
    foreign = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    agent().set("store of rank 0", f"{foreign.port} name-of-ours")
    waits = rank(1)
    give_time()
    agent().set("store of rank 0", "1 name-of-ours")  # where nothing listens
    give_time()
    assert not waits.done() and not foreign.check(["came 1"])
    assert are_together(rank(0), waits)


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_nobody_joins_gives_up(rank, agent, number):
    agent().set("store of rank 0", "1 gone")
    with pytest.raises(DistError, match=r"(?i)time"):
        rank(number, 0.3).result(20)
