"""MoE-LoRA (Liu et al. 2024, SIGIR): LoRA cut into experts, of which every task has its own mixture.

    y = x W^T + alpha sum_e gate_e(t) x A_e B_e        gate(t) = softmax(E[t] G)

with A_e (I x r / N), B_e (r / N x O, zero at the start), the embedding of tasks E ((T + 1) x 64) and the gate
G (64 x N) of one module. The experts' matrices lie side by side in A (I x r) and B (r x O). The last row of E belongs
to no task, as in the published code, and is never used. A and G start as LoRA's A, E at normal(0, 1). Per module
r (I + O) + 64 (T + 1) + 64 N values. alpha is not divided by r.

Shape legend: N rows, I input width, O output width, R rank of all experts together, T tasks and one, E experts,
W width of a task's embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatt_scale.adapter import LinearAdapter, LoraPair, TargetMap
from metatt_scale.adapter.leaves import Leaves, like_linear, normal
from metatt_scale.recipe import Recipe
from metatt_scale.recipe.adapter import initial_rank


class MoeLora(LinearAdapter):
    """The parameters `A`, `B`, `tasks` (E) and `gate` (G) of every target."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        settings, rank, self.n_tasks = recipe.adapter.moe_lora, initial_rank(recipe.adapter), len(recipe.tasks) or 1
        assert rank % settings.experts == 0, "the recipe checks this"
        start = {}
        for target in target_map.targets:
            a, e, g = (f"{target.path}.{name}" for name in ("A", "tasks", "gate"))
            start[a] = like_linear((target.d_in, rank), recipe.seed, a)
            start[f"{target.path}.B"] = torch.zeros(rank, target.d_out)
            start[e] = normal((self.n_tasks + 1, settings.task_width), 1.0, recipe.seed, e)
            start[g] = like_linear((settings.task_width, settings.experts), recipe.seed, g)
        super().__init__(target_map, dtype, recipe.adapter.alpha, Leaves(start))
        self.rank, self.n_experts = rank, settings.experts

    def summary(self) -> str:
        """Return rank, experts and tasks."""
        return f"MoE-LoRA of rank {self.rank} in {self.n_experts} experts, {self.n_tasks} tasks"

    def behind(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Add alpha sum_e gate_e(t) x A_e B_e, t the task of each row."""
        x_NI = x.reshape(-1, x.shape[-1]).to(self.compute_dtype)
        # One task scales all rows alike (R,), several each its own (N, R).
        scale_R = self._gate(index)[self.tasks_of(x)].to(self.compute_dtype)
        z_NO = (x_NI @ self.cast(index, "A") * scale_R) @ self.cast(index, "B")
        return y + (self.alpha * z_NO).to(y.dtype).view_as(y)

    def _gate(self, index: int) -> Tensor:
        """Return softmax(E G) with every expert's share repeated for each of its columns of A, (T, R)."""
        gate_TE = torch.softmax(self.leaf(index, "tasks") @ self.leaf(index, "gate"), dim=-1)
        return gate_TE.repeat_interleave(self.rank // self.n_experts, dim=-1)

    @torch.no_grad()
    def lora_pairs(self) -> list[LoraPair]:
        """Return lora_A = (A diag(gate(t)))^T and lora_B = B^T of the chosen task."""
        task, pairs = self.one_task(), []
        for index, target in enumerate(self.targets):
            a_IR = self.leaf(index, "A") * self._gate(index)[task]
            pairs.append(LoraPair(target.path, a_IR.mT.contiguous(), self.leaf(index, "B").detach().mT.contiguous()))
        return pairs
