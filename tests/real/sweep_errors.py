"""What sweeps cut off, predicted and measured: `python -m tests.real.sweep_errors ADAPTER [ADAPTER ...]`.

Each folder holds a trained adapter; beside them a random chain and one at its start (paper's initialisation, with the
first core random instead of zero), of the sizes of the first. Errors are parts of the chain's norm.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from metatt_scale.adapter import read_adapter
from metatt_scale.adapter.modes import ChainSpec, initial_cores
from metatt_scale.tensor import norm, ranks, subtract, sweep


def chains(folders: list[Path]) -> dict[str, list[Tensor]]:
    """Return all chains by name, in float64."""
    found, spec = {}, None
    for folder in folders:
        adapter = read_adapter(folder)
        spec = spec or adapter.spec
        found[folder.parent.name if folder.name == "adapter" else folder.name] = list(adapter.cores)
    assert spec is not None
    pairs = ["no"] * len(spec.sizes)
    found |= {"random": initial_cores(spec, "-".join(pairs), 1.0, 0)}
    start = ChainSpec(modes=spec.modes, sizes=spec.sizes, ranks=spec.ranks)
    found |= {"at the start": initial_cores(start, "-".join([*pairs[:-1], "id"]), 0.2, 0)}
    return {name: [core.detach().double() for core in cores] for name, cores in found.items()}


def main(folders: list[Path]) -> None:
    """Print a line per chain and rank."""
    print(f"{'':38}{'canonical':>24}{'as printed':>24}")
    print(f"{'chain':16} {'ranks':12} -> rank " + "   predicted    measured" * 2 + "   ratio of measured")
    for name, cores in chains(folders).items():
        size = float(norm(cores))
        for rank in sorted(
            {max(ranks(cores)) * 3 // 4, max(ranks(cores)) // 2, max(ranks(cores)) // 4}, reverse=True
        ):
            line = []
            for canonical in (True, False):
                swept = sweep(cores, max_ranks=rank, canonical=canonical)
                line += [swept.predicted_error / size, float(norm(subtract(cores, swept.cores))) / size]
            shown = ",".join(map(str, ranks(cores)))
            numbers = "".join(f"{value:12.6f}" for value in line)
            print(f"{name:16} {shown:12} -> {rank:4} {numbers} {line[3] / line[1]:9.3f}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
