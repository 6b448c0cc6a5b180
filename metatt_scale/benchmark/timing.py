"""Measuring several things fairly: in turns, round by round, on a device that works in the background."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

WARM_UP_ROUNDS = 2
"""Rounds before those that count."""


class Ratio(NamedTuple):
    """How two series compare, round by round."""

    median: float
    smallest: float
    largest: float


def turns(names: Sequence[str], repeats: int, warm_up: int = WARM_UP_ROUNDS) -> Iterator[tuple[int, str]]:
    """Yield (round, name) in the order A B C A B C ...; rounds below 0 warm up and do not count.

    What drifts on a machine (clock rates, neighbours) then meets all of them alike.
    """
    for number in range(-warm_up, repeats):
        for name in names:
            yield number, name


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of an action in seconds, with all that it left to the device."""
    wait(device)
    started = time.perf_counter()
    act()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    acts: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, show: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds of every action in each round that counts."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for number, name in turns(list(acts), repeats):
        show(f"{progress(number, repeats)}: {name}")
        taken = seconds_of(acts[name], device)
        if number >= 0:
            seconds[name].append(taken)
    return seconds


def progress(number: int, repeats: int) -> str:
    """Return a round's name for the terminal."""
    return f"round {number + 1} of {repeats}" if number >= 0 else "warm-up"


def ratios(values: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Return median, smallest and largest of the pairwise ratios of two series of equal length."""
    pairs = [a / b for a, b in zip(values, reference, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))
