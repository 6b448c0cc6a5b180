"""MTL-LoRA (Yang et al. 2025, AAAI): one down-projection, a small matrix per task, weighed up-projections.

    y = x W^T + alpha x A Lambda_t sum_i softmax(w_t / tau)_i B_i

with A (I x r), Lambda_t (r x r, identity at the start), B_i (r x O, zero at the start) and w_t in R^n, all of one
module. A starts as LoRA's; w_t at normal(0, 1), since equal weights would keep all B_i equal for ever. Per module
I r + T r^2 + n r O + T n values. alpha is not divided by r.

Shape legend: N rows, I input width, O output width, R rank, T tasks, K up-projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatt_scale.adapter import LinearAdapter, LoraPair, TargetMap
from metatt_scale.adapter.leaves import Leaves, like_linear, normal
from metatt_scale.recipe import Recipe
from metatt_scale.recipe.adapter import initial_rank


class MtlLora(LinearAdapter):
    """The parameters `A`, `tasks` (Lambda), `B` and `weights` (w) of every target."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        settings, rank, self.n_tasks = recipe.adapter.mtl_lora, initial_rank(recipe.adapter), len(recipe.tasks) or 1
        start = {}
        for target in target_map.targets:
            a, w = f"{target.path}.A", f"{target.path}.weights"
            start[a] = like_linear((target.d_in, rank), recipe.seed, a)
            start[f"{target.path}.tasks"] = torch.eye(rank).repeat(self.n_tasks, 1, 1)
            start[f"{target.path}.B"] = torch.zeros(settings.up_projections, rank, target.d_out)
            start[w] = normal((self.n_tasks, settings.up_projections), 1.0, recipe.seed, w)
        super().__init__(target_map, dtype, recipe.adapter.alpha, Leaves(start))
        self.rank, self.temperature = rank, settings.temperature

    def summary(self) -> str:
        """Return rank, tasks and up-projections."""
        n = self.leaf(0, "B").shape[0]
        return f"MTL-LoRA of rank {self.rank}, {self.n_tasks} tasks, {n} up-projections"

    def behind(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Add alpha x A Lambda_t sum_i softmax(w_t / tau)_i B_i, t the task of each row."""
        x_NI = x.reshape(-1, x.shape[-1]).to(self.compute_dtype)
        task, mix_TK = self.tasks_of(x), self._mix(index).to(self.compute_dtype)
        lambda_TRR, b_KRO = self.cast(index, "tasks"), self.cast(index, "B")
        h_NR = x_NI @ self.cast(index, "A")
        if isinstance(task, int):
            z_NO = (h_NR @ lambda_TRR[task]) @ torch.tensordot(mix_TK[task], b_KRO, 1)
        else:
            # All tasks' small products of a row are cheaper than a matrix gathered for every row.
            h_NTR = torch.einsum("np,tpq->ntq", h_NR, lambda_TRR)
            h_NR = h_NTR[torch.arange(len(task), device=task.device), task]
            z_NO = (mix_TK[task][:, :, None] * h_NR[:, None]).flatten(1) @ b_KRO.flatten(0, 1)
        return y + (self.alpha * z_NO).to(y.dtype).view_as(y)

    def _mix(self, index: int) -> Tensor:
        """Return the tasks' shares of the up-projections, (T, K)."""
        return torch.softmax(self.leaf(index, "weights") / self.temperature, dim=-1)

    @torch.no_grad()
    def lora_pairs(self) -> list[LoraPair]:
        """Return lora_A = (A Lambda_t)^T and lora_B = sum_i softmax(w_t / tau)_i B_i^T of the chosen task."""
        task, pairs = self.one_task(), []
        for index, target in enumerate(self.targets):
            a_IR = self.leaf(index, "A") @ self.leaf(index, "tasks")[task]
            b_RO = torch.tensordot(self._mix(index)[task], self.leaf(index, "B"), 1)
            pairs.append(LoraPair(target.path, a_IR.mT.contiguous(), b_RO.mT.contiguous()))
        return pairs
