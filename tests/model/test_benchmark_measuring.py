"""How a benchmark measures: time in fair turns, memory to the byte. No test asserts seconds."""

import os

import pytest
import torch

from metatt_scale.benchmark.memory import held_bytes, peak_bytes
from metatt_scale.benchmark.timing import ratios, take_turns, turns
from metatt_scale.benchmark.turns import LoopInTurns
from tests.toy import CPU

# ---- fair turns


def test_turns_are_taken_round_by_round():
    once = ["A", "B", "C"]
    assert [name for _, name in turns(once, 2)] == once * 4
    assert [number for number, _ in turns(once, 2)] == [-2] * 3 + [-1] * 3 + [0] * 3 + [1] * 3
    calls = []
    acts = {name: lambda name=name: calls.append(name) for name in once}
    seconds = take_turns(acts, 3, CPU, lambda text: None)
    assert calls == once * 5 and {name: len(s) for name, s in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_ratios_are_taken_pair_by_pair():
    assert ratios((1.1, 2.6, 4.8), (1.0, 2.0, 4.0)) == pytest.approx((1.2, 1.1, 1.3))


def loop_that_logs(ready, pause, name, pauses, log):
    ready(name)
    for i in range(pauses):
        with open(log, "a") as file:
            file.write(f"{name}{i} ")
        if pause():
            break
    return pauses


def loop_that_fails(ready, pause):
    ready(None)
    pause()
    raise ValueError("told")


def loop_that_dies(ready, pause):
    ready(None)
    os._exit(3)


def test_loops_in_processes_take_turns(tmp_path):
    log = tmp_path / "log"
    a, b = (LoopInTurns(loop_that_logs, name, 9, str(log)) for name in "ab")
    assert (a.facts, b.facts) == ("a", "b") and not log.exists()
    for _ in range(2):
        a.advance()
        b.advance()
    assert (a.close(), b.close()) == (9, 9)
    assert log.read_text().split() == ["a0", "b0", "a1", "b1"]


def test_a_loop_that_fails_says_why():
    broken = LoopInTurns(loop_that_fails)
    broken.advance()
    with pytest.raises(ValueError, match="told"):
        broken.advance()
    with pytest.raises(ValueError, match="ended with code 3"):
        LoopInTurns(loop_that_dies).advance()


# ---- memory


def test_the_peak_is_counted_to_the_byte():
    def bytes_of(size):
        return torch.empty(size, dtype=torch.uint8)

    before = bytes_of(10_000)

    def act():
        a, b = bytes_of(1000), bytes_of(500)
        del a
        c = bytes_of(700)  # 1200 now, 1500 was the most
        view, d = c[:100], before.add_(1)  # no memory of their own
        return b, view, d

    assert peak_bytes(act, CPU) == 1500
    x = torch.ones(100, 50, requires_grad=True)
    # x + x, and in the backward pass the gradient it adds up for x; both 20,000 bytes, the scalars beside them small.
    assert 20_000 <= peak_bytes(lambda: (x + x).sum().backward(), CPU) <= 40_100
    assert x.grad is not None and held_bytes([x, x[:1], x.view(-1), x.grad]) == 40_000
