"""What three ranks tell each other; each writes what it saw to FOLDER/rank-N.json."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch

from metatt_scale.parallel import OtherRankError, ReplicasDifferError, World, check_same, join
from metatt_scale.training.reduce import sum_step
from tests.toy import CPU


def caught(act):
    """The class and message of what `act` raises."""
    try:
        act()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def fail():
    """What happens when a disk is full."""
    raise ValueError("no room on the disk")


def report(world: World) -> dict:
    """Everything this rank sees."""
    rank = world.rank
    seen = {"rank": rank, "size": world.size, "first": world.is_first}
    seen["sum"] = world.sum(torch.tensor([1.0, float(rank)])).tolist()
    seen["joined"] = world.concatenate(torch.full((rank, 2), rank)).tolist()
    seen["gathered"] = world.gather(torch.tensor([rank, 10 * rank])).tolist()
    tensors = {"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 4), "half": torch.ones(2).bfloat16()}
    value, got = world.from_first(lambda: ({"x": [1, None, "ä"]}, tensors) if rank == 0 else (1 / 0, {}))
    seen["message"] = [value, {name: [str(t.dtype), list(t.shape), t.float().tolist()] for name, t in got.items()}]
    seen["failure"] = caught(lambda: world.on_first(fail))
    seen["after failure"] = world.sum(torch.ones(1)).tolist()

    gradients = [torch.full((2, 2), float(rank + 1)), torch.tensor([float(rank)])]
    signals = [None, 15, None]
    sums = sum_step(
        world, gradients, torch.tensor(0.5 * rank, dtype=torch.float64), 1000 + rank, signals[rank]
    ).read()
    seen["step"] = [sums.loss, sums.tokens, sums.nonfinite_ranks, sums.stop_signal, sums.gradient_norm]
    seen["gradients"] = [gradient.tolist() for gradient in gradients]
    bad = [torch.tensor([float("nan") if rank == 2 else 1.0])]
    sums = sum_step(world, bad, torch.tensor(float("inf") if rank == 1 else 0.0), 1, None).read()
    seen["nonfinite"] = [sums.nonfinite_ranks, sums.gradient_norm != sums.gradient_norm]

    core = torch.arange(4.0)
    other = core.clone()
    if rank == 1:
        other[3] = torch.nextafter(other[3], torch.tensor(9.0))  # a single bit
    seen["same"] = caught(lambda: check_same(world, {"core 0": [core], "text": "t"}, "stop"))
    seen["differ"] = caught(lambda: check_same(world, {"core 0": [core], "core 1": [core, other]}, "look there"))
    texts = {"the recipe": "b" if rank == 2 else "a", "all": str(rank)}
    seen["texts"] = caught(lambda: check_same(world, texts, "agree"))
    assert issubclass(ReplicasDifferError, ValueError) and not issubclass(OtherRankError, ValueError)
    return seen


if __name__ == "__main__":
    with join(CPU, timedelta(seconds=60)) as world:
        (Path(sys.argv[1]) / f"rank-{world.rank}.json").write_text(json.dumps(report(world)))
