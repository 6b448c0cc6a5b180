"""LoRETTA (Yang et al. 2024, arXiv 2402.11417): thin matrices whose entries are those of tensor trains.

The I x O entries of a matrix, row after row, are those of a tensor with small modes, which is stored as a chain; all
inner bonds have the rank `adapter.loretta.tensor_rank`. A number without small factors is padded to the next that has
them, and what is beyond is cut off.

    loretta_rep    y = x W^T + alpha x A B                   A (I x r), B (r x O) are chains: LoRA
    loretta_adp    y = z + alpha (gelu(z A + a) B + b)       A (O x w), B (w x O) are chains, z the frozen output

`adp` is a bottleneck of Houlsby et al. 2019 (arXiv 1902.00751) behind the last linear of a layer's attention and the
last of its MLP, before dropout and residual. At the start entries of A have the variance of LoRA's, and the last core
of B and both biases are zero, so that step 0 is the frozen model. Neither divides alpha by a rank.

Shape legend: N rows, I input width, O output width, R width between A and B.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from metatt_scale.adapter import LinearAdapter, LoraPair, TargetMap, find_targets
from metatt_scale.adapter.leaves import Leaves, normal
from metatt_scale.adapter.targets import is_linear, widths
from metatt_scale.recipe import AdapterRecipe, Recipe
from metatt_scale.recipe.adapter import initial_rank
from metatt_scale.tensor import materialise

LARGEST_FACTOR = 12
"""Of a number of entries: 768 x 64 is 8 x 8 x 12 x 8 x 8, as in the published tables."""


@functools.cache
def fold(entries: int) -> tuple[int, ...]:
    """Return the factors of the least number from `entries` on that has none above LARGEST_FACTOR.

    Of several ways the one of the fewest factors is taken, of these the one of the smallest sum: the values of a
    chain grow with the sum of its modes. They stand as in the published tables, the small ones at the ends.
    """
    number = entries
    while not (ways := list(_factorisations(number, 2))):
        number += 1
    rising = min(ways, key=lambda factors: (len(factors), sum(factors), factors))
    return rising[0::2] + rising[1::2][::-1]


def _factorisations(number: int, least: int) -> Iterator[tuple[int, ...]]:
    if number == 1:
        yield ()
    for factor in range(least, LARGEST_FACTOR + 1):
        if number % factor == 0:
            yield from ((factor, *rest) for rest in _factorisations(number // factor, factor))


def core_shapes(rows: int, columns: int, rank: int) -> list[tuple[int, int, int]]:
    """Return the shapes (left bond, mode, right bond) of the chain of a matrix."""
    modes = fold(rows * columns)
    bonds = (1, *[rank] * (len(modes) - 1), 1)
    return list(zip(bonds[:-1], modes, bonds[1:], strict=True))


class _FoldedMatrices(LinearAdapter):
    """Owner of two chains for every target, `A_0`, `A_1`, ... and `B_0`, `B_1`, ...."""

    def __init__(
        self,
        target_map: TargetMap,
        recipe: Recipe,
        dtype: torch.dtype,
        shapes: list[tuple[tuple[int, int], ...]],
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._shapes, self.tensor_rank = shapes, recipe.adapter.loretta.tensor_rank
        start = dict(biases or {})
        for target, pair in zip(target_map.targets, shapes, strict=True):
            for letter, (rows, columns) in zip("AB", pair, strict=True):
                cores = core_shapes(rows, columns, self.tensor_rank)
                # An entry is a sum over all bonds of products of one value per core.
                terms = math.prod(core[0] for core in cores)
                std = (1 / (3 * rows * terms)) ** (1 / (2 * len(cores)))
                for k, core in enumerate(cores):
                    name = f"{target.path}.{letter}_{k}"
                    zero = letter == "B" and k == len(cores) - 1
                    start[name] = torch.zeros(core) if zero else normal(core, std, recipe.seed, name)
        super().__init__(target_map, dtype, recipe.adapter.alpha, Leaves(start))

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """Return A and B of one target, contracted in the precision of the cores."""
        path, found = self.targets[index].path, []
        for letter, (rows, columns) in zip("AB", self._shapes[index], strict=True):
            dense = materialise([self.leaves[f"{path}.{letter}_{k}"] for k in range(len(fold(rows * columns)))])
            found.append(dense.flatten()[: rows * columns].view(rows, columns))
        return found[0], found[1]


class LorettaRep(_FoldedMatrices):
    """LoRA whose two matrices are chains."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        self.rank = rank = initial_rank(recipe.adapter)
        super().__init__(target_map, recipe, dtype, [((t.d_in, rank), (rank, t.d_out)) for t in target_map.targets])

    def summary(self) -> str:
        """Return both ranks."""
        return f"LoRETTA-rep of rank {self.rank}, tensor trains of rank {self.tensor_rank}"

    def behind(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Add alpha x A B."""
        a_IR, b_RO = (matrix.to(self.compute_dtype) for matrix in self.matrices(index))
        return y + (self.alpha * (x.to(self.compute_dtype) @ a_IR @ b_RO)).to(y.dtype)

    @torch.no_grad()
    def lora_pairs(self) -> list[LoraPair]:
        """Return lora_A = A^T and lora_B = B^T."""
        pairs = []
        for index, target in enumerate(self.targets):
            a_IR, b_RO = self.matrices(index)
            pairs.append(LoraPair(target.path, a_IR.mT.contiguous(), b_RO.mT.contiguous()))
        return pairs


class LorettaAdp(_FoldedMatrices):
    """Bottlenecks whose two matrices are chains; their biases are `a` and `b`."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        self.width = recipe.adapter.loretta.bottleneck
        shapes = [((t.d_out, self.width), (self.width, t.d_out)) for t in target_map.targets]
        sizes = [(target.path, {"a": self.width, "b": target.d_out}) for target in target_map.targets]
        biases = {f"{path}.{name}": torch.zeros(n) for path, own in sizes for name, n in own.items()}
        super().__init__(target_map, recipe, dtype, shapes, biases)

    def summary(self) -> str:
        """Return the bottleneck's width and the rank."""
        return f"LoRETTA-adp, bottlenecks of {self.width}, tensor trains of rank {self.tensor_rank}"

    def behind(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Add alpha (gelu(y A + a) B + b)."""
        path = self.targets[index].path
        values = (*self.matrices(index), self.leaves[f"{path}.a"], self.leaves[f"{path}.b"])
        a_OR, b_RO, a_R, b_O = (value.to(self.compute_dtype) for value in values)
        inner_NR = F.gelu(y.to(self.compute_dtype) @ a_OR + a_R)
        return y + (self.alpha * (inner_NR @ b_RO + b_O)).to(y.dtype)

    @torch.no_grad()
    def is_zero(self) -> bool:
        """Return whether B and b are zero behind every target."""
        return not any(
            bool(self.leaves[f"{target.path}.b"].any()) or bool(self.matrices(index)[1].any())
            for index, target in enumerate(self.targets)
        )

    def deltas(self) -> Iterator[Tensor]:
        """Refuse: a bottleneck is no change of a weight."""
        raise ValueError(
            f"{self.summary()}: a bottleneck with a nonlinearity is no change of weights, so nothing can be merged; "
            "export it as `metatt`"
        )


def find_outputs(model: PreTrainedModel, recipe: AdapterRecipe) -> TargetMap:
    """Return the last linear of every layer's attention, and the last of its others, that give the hidden width.

    Raises:
        ValueError: a layer has not one of each.
    """
    hidden = model.config.get_text_config().hidden_size
    found: dict[str, dict[bool, str]] = defaultdict(dict)
    for path, module in model.named_modules():
        parts = path.split(".")
        number = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if number is None or not is_linear(module):
            continue
        outputs, inner = found[".".join(parts[: number + 1])], parts[number + 1 :]
        if widths(module)[1] == hidden:
            outputs[any("attn" in part or "attention" in part for part in inner)] = path
    for layer, outputs in found.items():
        if len(outputs) < 2 or any(part.isdigit() for path in outputs.values() for part in _inside(path, layer)):
            raise ValueError(
                f"adapter.kind is loretta_adp, but {layer} of {type(model).__name__} has not one attention and one "
                f"MLP that end in a linear of the hidden width {hidden}; use loretta_rep"
            )
    return find_targets(model, tuple(path for pair in found.values() for path in pair.values()), recipe.layers)


def _inside(path: str, layer: str) -> list[str]:
    return path.removeprefix(f"{layer}.").split(".")
