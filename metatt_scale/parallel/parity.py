"""Does a sharded 4-bit layer compute what the whole one computed?

Engines cut packed bytes that they take for floats; a cast, a lost quant state or a repacked weight changes every
output without any error. So the first 4-bit linear that is sharded answers a question before and after, and training
does not start unless the answers agree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from metatt_scale.parallel.world import World

_BOUND = 1e-5
"""Relative difference allowed: both sides run the same kernel on the same bytes, and are normally the same bits."""


class Parity:
    """One 4-bit linear, and what it answered while its weight was whole."""

    def __init__(self) -> None:
        self._asked: tuple[nn.Module, nn.Linear, tuple[Tensor, Tensor]] | None = None

    def remember(self, unit: nn.Module) -> None:
        """Ask the first 4-bit linear of a unit that is about to be sharded; later units are not asked."""
        if self._asked is None:
            for module in unit.modules():
                if isinstance(module, nn.Linear) and getattr(module, "quant_state", None) is not None:
                    self._asked = unit, module, _answer(module)
                    return

    def check(self, world: World, gathered: Callable[[nn.Module], AbstractContextManager[object]]) -> None:
        """Ask again, with the unit's weights gathered by its engine; all ranks call it.

        Args:
            world: the ranks.
            gathered: context in which the weights of a unit are whole.

        Raises:
            ValueError: the answers differ on some rank.
        """
        if self._asked is None:
            return
        unit, linear, expected = self._asked
        self._asked = None
        with gathered(unit):
            pairs = zip(_answer(linear), expected, strict=True)
            differences = torch.stack([(got - wanted).norm() / wanted.norm() for got, wanted in pairs])
        worst = differences.max().item()  # unlike Python's max, not a number where one of them is not
        wrong = torch.tensor([float(not worst <= _BOUND)], device=world.device)
        ranks = world.gather(wrong).flatten().nonzero().flatten().tolist()
        if ranks:
            raise ValueError(
                "parallel.backbone: a sharded 4-bit layer does not compute what it did before it was sharded (ranks "
                f"{', '.join(map(str, ranks))}; relative difference on this one {worst:.1e}, allowed {_BOUND:.0e}), "
                "so training would be on damaged weights; set backbone.quantization: none or parallel.backbone: "
                "replicate, or install the versions of bitsandbytes, torch and deepspeed that the tests pass with"
            )


def _answer(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the linear's output for a fixed input (3 x d_out), and the gradient of that input (3 x d_in)."""
    state = linear.quant_state
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, linear.in_features, generator=generator)
    x = x.to(state.absmax.device, state.dtype).requires_grad_()  # type: ignore[union-attr]
    direction = torch.randn(3, linear.out_features, generator=generator)
    with torch.enable_grad():
        y = linear.forward(x)  # not through an engine's hooks: the weight is there
        (gradient,) = torch.autograd.grad(y, x, direction.to(y))
    return y.detach().float(), gradient.float()
