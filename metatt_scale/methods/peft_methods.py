"""LoRA, VeRA and what AdaLoRA shares with them as PEFT computes them, behind the interface of every adapter.

PEFT never sees the model. It puts its layers into a tree of stand-ins, linears of the right widths without storage,
from the list of targets alone; `attach` then lets each layer compute beside the real linear. PEFT would take FSDP2's
shards for those of tensor parallelism and make its factors too narrow, and give them the type of the frozen weights
and layers for 4 bits; behind a stand-in its parameters are fp32. It computes in fp32 beside a backbone of 16 or 4
bits, and rounds the sum to the backbone's type. The parameters belong to no shard: every rank holds all of them, and
the loop adds up their gradients like those of a chain.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import Adapter, LoraPair, TargetMap
from metatt_scale.adapter.placed import Placed, place
from metatt_scale.adapter.targets import Target
from metatt_scale.recipe import Recipe
from metatt_scale.recipe.adapter import initial_rank

TRAINED, START = "default", "start"
"""PEFT's names of the trained factors, and of the fixed ones that are subtracted (`Lora`)."""


def import_peft() -> Any:
    """Return PEFT.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(
            "adapter.kind lora, vera and adalora, and the benchmark, need PEFT, which is not installed; run `pip "
            "install metatt-scale[peft]`"
        ) from None
    return peft


class BesidePeft(Placed):
    """A frozen linear whose output passes through PEFT's layer."""

    def __init__(self, base_layer: nn.Module, adapter: PeftAdapter, layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._owner = (adapter, layer)  # inside a tuple, so that nn.Module does not register them as children

    def forward(self, x: Tensor) -> Tensor:
        """Return what PEFT's layer makes of x; it calls the linear itself."""
        if self.merged_layer is not None:
            return self.merged_layer(x)
        adapter, layer = self._owner
        return layer(x) if adapter.enabled else self.base_layer(x)


class PeftAdapter(Adapter):
    """The owner of what PEFT's layers train."""

    parts: tuple[str, ...] = ()
    """Attributes of PEFT's layers that are trained."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        """Let PEFT make its layers; their random values follow from the seed."""
        super().__init__(target_map, dtype)
        self.recipe, self.seed, self.rank = recipe.adapter, recipe.seed, initial_rank(recipe.adapter)
        self.alpha = recipe.adapter.alpha
        tree = _stand_ins(self.targets, torch.promote_types(dtype, torch.float32))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Conv1D
            torch.manual_seed(self.seed)
            tuner = self._put_layers(tree)
        # In tuples: once attached, layers hold linears of the model, which are no part of the adapter.
        self._tree, self._tuner = (tree,), (tuner,)
        self._layers = tuple(tree.get_submodule(target.path) for target in self.targets)
        mine = {id(parameter) for parameter in self.own().values()}
        for parameter in tree.parameters():
            parameter.requires_grad_(id(parameter) in mine)

    @abstractmethod
    def _put_layers(self, tree: nn.Module) -> nn.Module:
        """Let PEFT put its layers into the tree, and return what it calls a tuner."""

    def _shared_settings(self) -> dict[str, Any]:
        return {
            "target_modules": [target.path for target in self.targets],
            "fan_in_fan_out": any(target.transposed for target in self.targets),
        }

    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Put PEFT's layers behind their targets."""
        self.linears = place(model, self.targets, lambda linear, index: BesidePeft(linear, self, self._layers[index]))
        for placed, layer in zip(self.linears, self._layers, strict=True):
            layer.base_layer = placed.base_layer
            for name, part in layer.named_children():
                if name != "base_layer":
                    part.to(device)

    def layer_and_path(self) -> list[tuple[Any, str]]:
        """Return PEFT's layer of every target, and the target's path."""
        return [(layer, target.path) for layer, target in zip(self._layers, self.targets, strict=True)]

    def own(self) -> dict[str, nn.Parameter]:
        """Return the parameters as `PATH.lora_A` and so on."""
        return {
            f"{path}.{part}": _parameter(getattr(layer, part)[TRAINED])
            for layer, path in self.layer_and_path()
            for part in self.parts
        }

    @torch.no_grad()
    def lora_pairs(self) -> list[LoraPair]:
        """Return the exact factors of every target."""
        tensors = self.result()
        return [LoraPair(target.path, *self._pair(target, tensors)) for target in self.targets]

    def _pair(self, target: Target, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return A (r x input) and B (output x r) of one target, alpha left out, from the adapter's tensors."""
        return tensors[f"{target.path}.lora_A"], tensors[f"{target.path}.lora_B"]

    def summary(self) -> str:
        """Return kind and rank for a person."""
        start = f", {self.recipe.init}" if self.recipe.init else ""
        return f"{self.recipe.kind}, rank {self.rank}{start}"


class Lora(PeftAdapter):
    """LoRA (Hu et al. 2022): y = x W^T + alpha x A^T B^T, where PEFT says lora_alpha / r for alpha.

    PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) start at factors A0, B0 of the frozen weight itself, and take
    alpha B0 A0 off the weight. Packed and sharded weights cannot be rewritten without loss, so here the frozen
    weight stays as it is and the fixed product is taken off the output, by a second pair of factors that PEFT adds
    with the opposite sign:

        y = x W^T + alpha (x A^T B^T - x A0^T B0^T)

    Step 0 is the frozen model, and an adapter never depends on an SVD that is computed again.
    """

    parts = ("lora_A", "lora_B")

    def _put_layers(self, tree: nn.Module) -> nn.Module:
        if self.has_start:
            self._check_rank()
        peft, settings = import_peft(), {"r": self.rank, **self._shared_settings()}
        random = "gaussian" if self.recipe.init == "gaussian" else True
        config = peft.LoraConfig(lora_alpha=self.alpha * self.rank, init_lora_weights=random, **settings)
        tuner = peft.LoraModel(tree, config, TRAINED)
        if self.has_start:
            opposite = peft.LoraConfig(lora_alpha=-self.alpha * self.rank, **settings)
            peft.inject_adapter_in_model(opposite, tree, START)
            for target in self.targets:
                tree.get_submodule(target.path).set_adapter([TRAINED, START])  # type: ignore[operator]
        return tuner

    def _check_rank(self) -> None:
        """Refuse a start from singular vectors that a matrix does not have."""
        for path, d_in, d_out in ((target.path, target.d_in, target.d_out) for target in self.targets):
            if self.rank > min(d_in, d_out):
                raise ValueError(
                    f"adapter.rank is {self.rank}, but {path} is {d_in} -> {d_out}, so adapter.init "
                    f"{self.recipe.init} finds no more than {min(d_in, d_out)} directions in it; lower the rank"
                )

    @property
    def has_start(self) -> bool:
        """Whether fixed factors are subtracted."""
        return self.recipe.init in ("pissa", "olora")

    def kept(self) -> dict[str, Tensor]:
        """Return A0 and B0 of every target as `PATH.start_A`, `PATH.start_B`, where there are any."""
        if not self.has_start:
            return {}
        return {
            f"{path}.start_{part[-1]}": _parameter(getattr(layer, part)[START])
            for layer, path in self.layer_and_path()
            for part in self.parts
        }

    def _pair(self, target: Target, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return [A; A0] and [B, -B0], of rank 2r, where there is a start."""
        a_RI, b_OR = super()._pair(target, tensors)
        if not self.has_start:
            return a_RI, b_OR
        a0_RI, b0_OR = tensors[f"{target.path}.start_A"], tensors[f"{target.path}.start_B"]
        return torch.cat([a_RI, a0_RI]), torch.cat([b_OR, -b0_OR], dim=1)

    def start_at(self, factors: Mapping[str, Tensor]) -> None:
        """Begin at these A0 and B0, by the names of `kept`."""
        self.set_values(dict(factors) | {name.replace(".start_", ".lora_"): value for name, value in factors.items()})


class Vera(PeftAdapter):
    """VeRA (Kopiczko et al. 2024): y = x W^T + ((x A^T) * d) B^T * b, with A and B random, frozen and shared by all.

    A and B are as wide as the widest target; narrower ones use their first columns and rows. The adapter's files keep
    them: they follow from the seed, but another version of torch may draw other numbers.
    """

    parts = ("vera_lambda_d", "vera_lambda_b")

    def _put_layers(self, tree: nn.Module) -> nn.Module:
        peft, self.alpha = import_peft(), 1.0  # VeRA has no scale
        settings = {"d_initial": self.recipe.vera.d_initial, "projection_prng_key": self.seed}
        return peft.VeraModel(tree, peft.VeraConfig(r=self.rank, **settings, **self._shared_settings()), TRAINED)

    def kept(self) -> dict[str, Tensor]:
        """Return the shared projections."""
        tuner: Any = self._tuner[0]
        return {"vera_A": tuner.vera_A[TRAINED], "vera_B": tuner.vera_B[TRAINED]}

    def _pair(self, target: Target, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        a_RI, b_OR = tensors["vera_A"][:, : target.d_in], tensors["vera_B"][: target.d_out]
        d_R, b_O = tensors[f"{target.path}.vera_lambda_d"], tensors[f"{target.path}.vera_lambda_b"]
        return a_RI * d_R[:, None], b_OR * b_O[:, None]

    def own_peft_form(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return PEFT's VeRA; the projections travel along, and the seed is what they were drawn from."""
        settings = {"peft_type": "VERA", "r": self.rank, "save_projection": True, "projection_prng_key": self.seed}
        state = {f"base_model.{name}": value for name, value in self.kept().items()}
        return settings, state | {f"base_model.model.{name}": value.detach() for name, value in self.own().items()}


def _stand_ins(targets: Sequence[Target], dtype: torch.dtype) -> nn.Module:
    """Return a tree with a linear without storage at the path of every target."""
    tree, zero = nn.Module(), torch.zeros((), dtype=dtype)
    for target in targets:
        *parents, name = target.path.split(".")
        parent = tree
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        with torch.device("meta"):
            shape = (target.d_in, target.d_out)
            linear = Conv1D(*reversed(shape)) if target.transposed else nn.Linear(*shape, bias=False)
        linear.weight = nn.Parameter(zero.expand(linear.weight.shape), requires_grad=False)
        parent.add_module(name, linear)
    return tree


def _parameter(part: nn.Module | nn.Parameter) -> nn.Parameter:
    """Return the parameter of a part of PEFT's layer: itself, or the weight of a linear."""
    parameter = part.weight if isinstance(part, nn.Module) else part
    assert isinstance(parameter, nn.Parameter)
    return parameter
