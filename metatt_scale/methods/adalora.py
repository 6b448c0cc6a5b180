"""AdaLoRA (Zhang et al. 2023): LoRA in the form of an SVD, whose rank moves to where it matters.

    y = x W^T + alpha x (A * E)^T B^T        A (r x d_in), E (r x 1), B (d_out x r), r the rank at the start

After every step the sensitivity |w dL/dw| of each value is smoothed, and from time to time the triplets (row of A,
entry of E, column of B) of the lowest scores lose their entry of E, until the rank is `adapter.rank` on average. All
of it depends on parameters and summed gradients alone, so that all processes decide alike. Layers, scores and budget
are PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import Target, TargetMap
from metatt_scale.determinism import any_kernels
from metatt_scale.methods.peft_methods import TRAINED, PeftAdapter, import_peft
from metatt_scale.recipe import Recipe

_UNKNOWN_YET = 1 << 40
"""PEFT wants the number of steps before it is known."""


class AdaLora(PeftAdapter):
    """PEFT's AdaLoRA, its allocation driven by the loop."""

    parts = ("lora_A", "lora_E", "lora_B")

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        """As every method of PEFT."""
        super().__init__(target_map, recipe, dtype)
        self._total_steps: int | None = None
        # 1 where a triplet of the final allocation stays; all 1 before that is made.
        self._masks: dict[str, Tensor] = {}
        self._allocated = torch.zeros(())

    def _put_layers(self, tree: nn.Module) -> nn.Module:
        peft, self._settings = import_peft(), self.recipe.adalora
        config = peft.AdaLoraConfig(
            target_r=self.recipe.rank,
            lora_alpha=self.alpha * (self.rank + 1e-5),  # what PEFT divides by
            total_step=_UNKNOWN_YET,
            **self._settings.model_dump(exclude={"init_r"}),
            init_r=self.rank,
            **self._shared_settings(),
        )
        return peft.AdaLoraModel(tree, config, TRAINED)

    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Put PEFT's layers behind their targets, with scores of zero."""
        super().attach(model, device)
        for layer, _ in self.layer_and_path():
            if type(layer.base_layer) not in (nn.Linear, Conv1D):
                # PEFT adds in place, and packed linears may return views that nothing may write into.
                layer.base_layer.register_forward_hook(lambda _module, _inputs, y: y.clone())
        allocator = self._allocator
        # PEFT makes them at the first step; a resume fills them before.
        for name, parameter in self._own_parameters():
            for scores in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
                scores[name] = torch.zeros_like(parameter)
            allocator.ipt[name] = torch.zeros_like(parameter)
        self._masks = {path: torch.ones_like(layer.lora_E[TRAINED]) for layer, path in self.layer_and_path()}
        self._allocated = next(iter(self._masks.values())).new_zeros(())

    @property
    def _allocator(self) -> Any:
        tuner: Any = self._tuner[0]
        return tuner.rankallocator

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trained parameters by their names in the model, which PEFT knows them by."""
        return [(f"{name}.{TRAINED}", parameter) for name, parameter in self.own().items()]

    def history(self) -> dict[str, Tensor]:
        """Return the smoothed sensitivities and their uncertainties, and the final allocation."""
        if not self._masks:  # not attached
            return {}
        found = {"allocated": self._allocated}
        found |= {f"{path}.mask": mask for path, mask in self._masks.items()}
        for key, scores in (("sensitivity", "exp_avg_ipt"), ("uncertainty", "exp_avg_unc")):
            by_name = getattr(self._allocator, scores)
            found |= {
                f"{name.removesuffix('.' + TRAINED)}.{key}": by_name[name] for name, _ in self._own_parameters()
            }
        return found

    def begin(self, total_steps: int) -> None:
        """Fit the schedule of the budget to the run."""
        self._total_steps = total_steps
        self._allocator.set_total_step(total_steps)

    @property
    def settled(self) -> bool:
        """Whether the last rank has been taken away."""
        return bool(self._allocated)

    def penalise(self, share: float) -> None:
        """Leave gradients of weight * mean over all A and B of |A A^T - 1|, |B^T B - 1| (Frobenius), their eq. 4."""
        if not self._settings.orth_reg_weight:
            return
        norms = []
        for layer, _ in self.layer_and_path():
            a_RI, b_OR = layer.lora_A[TRAINED], layer.lora_B[TRAINED]
            one_RR = torch.eye(len(a_RI), dtype=a_RI.dtype, device=a_RI.device)
            norms += [
                torch.linalg.matrix_norm(a_RI @ a_RI.mT - one_RR),
                torch.linalg.matrix_norm(b_OR.mT @ b_OR - one_RR),
            ]
        (share * self._settings.orth_reg_weight * torch.stack(norms).mean()).backward()

    @torch.no_grad()
    def stepped(self, step: int, finite: Tensor) -> None:
        """Update the scores and allocate rank where that is due.

        Waits for the device: the scores' threshold is read by the host anyway.
        """
        if not bool(finite):
            return
        assert self._total_steps is not None, "begin comes first"
        allocator, model = self._allocator, self._tree[0]
        last = self._total_steps - self._settings.tfinal
        if step < last:
            with any_kernels():  # its threshold is a value of kthvalue, which calls its indices nondeterministic
                allocator.update_and_allocate(model, step)
        elif not bool(self._allocated):  # normally at `last`; behind it if that step was not finite
            with any_kernels():
                _, pattern = allocator.update_and_allocate(model, step, force_mask=True)
            for path, mask in self._masks.items():
                mask.copy_(torch.tensor(pattern[f"{path}.lora_E.{TRAINED}"])[:, None])
            self._allocated.fill_(1)
        else:
            for layer, path in self.layer_and_path():
                layer.lora_E[TRAINED].mul_(self._masks[path])

    def _pair(self, target: Target, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        a_RI, b_OR = super()._pair(target, tensors)
        return a_RI * tensors[f"{target.path}.lora_E"], b_OR

    def summary(self) -> str:
        """Return the ranks at both ends for a person."""
        return f"adalora, rank {self.rank} to {self.recipe.rank} on average"
