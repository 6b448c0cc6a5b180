"""The cores of another run as the start of this one, with slices for tasks that it did not know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatt_scale.adapter.modes import ChainSpec


def grown_cores(
    old: ChainSpec, cores: Sequence[Tensor], old_tasks: Sequence[str], new: ChainSpec, new_tasks: Sequence[str]
) -> list[Tensor]:
    """Return cores of the new form that compute what the old ones did for every task these knew.

    A slice of the task core goes with its task's name. A new task starts from the mean of the old slices, what the
    tasks so far have in common. Where the old chain had no task core, every slice is the identity.

    Raises:
        ValueError: another order of modes, other sizes or ranks, or a task of the old chain that is missing here.
    """
    if missing := [task for task in old_tasks if task not in new_tasks] if old.n_tasks else []:
        raise ValueError(f"it knows the task {missing[0]!r}, which `tasks` does not name; keep it among them")
    kept_modes = [mode for mode in new.modes if mode != "task" or old.n_tasks]
    if list(old.modes) != kept_modes or old.diagonal != new.diagonal:
        raise ValueError(f"its modes are {', '.join(old.modes)}, those of this recipe {', '.join(new.modes)}")
    result, place = [], 0
    for mode, shape in zip(new.modes, new.shapes, strict=True):
        if mode == "task" and old.n_tasks is None:
            core = torch.eye(shape[0], shape[2])[:, None].repeat(1, shape[1], 1)
        else:
            core, place = cores[place], place + 1
            if mode == "task":
                mean = core.mean(1)
                core = torch.stack(
                    [core[:, old_tasks.index(name)] if name in old_tasks else mean for name in new_tasks], 1
                )
        if tuple(core.shape) != shape:
            raise ValueError(
                f"its core of {mode} is {tuple(core.shape)}, this recipe's {shape}; take its rank and targets"
            )
        result.append(core.clone())
    return result
