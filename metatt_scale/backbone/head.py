"""What stands behind an encoder's last layer: its pooler, if it has one, and the head of its task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from metatt_scale.heads import in_head


@dataclass(frozen=True, eq=False)
class HeadStart:
    """What a head that is made anew starts with, where it is not what the class of the model says."""

    std: float | None = None
    """Standard deviation of its random weights."""
    bias_K: Tensor | None = None
    """Bias of its last linear, one number per output."""


def last_linear(names: Iterable[str]) -> str:
    """Return the path of the linear whose outputs are the labels: `classifier`, of RoBERTa `classifier.out_proj`."""
    return "classifier.out_proj" if any(name.startswith("classifier.out_proj.") for name in names) else "classifier"


def head_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters of the head by name, whole and on the CPU. All ranks of a sharded model call this."""
    head: dict[str, Any] = {name: p.detach() for name, p in model.named_parameters() if in_head(model, name)}
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in head.items()}
    return {name: cast(Tensor, p).cpu().contiguous() for name, p in whole.items()}
