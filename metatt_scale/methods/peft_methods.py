"""LoRA and VeRA as PEFT computes them, behind the interface of every adapter.

PEFT puts layers of its own into the places of the model's linears, after an engine has sharded these: the parameters
of its layers belong to no shard, every rank holds all of them, and the loop adds up their gradients like those of a
chain. While PEFT does so, stand-ins of the right widths take the places of the real linears. It would take FSDP2's
shards for those of tensor parallelism and make its factors too narrow, and give them the type of the frozen weights
and layers for 4 bits; behind a stand-in its parameters are fp32. It computes in fp32 beside a backbone of 16 or 4
bits, and rounds the sum to the backbone's type.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import Adapter, TargetMap
from metatt_scale.adapter.inject import compute_dtype
from metatt_scale.recipe import AdapterRecipe
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
            "adapter.kind lora, vera and adalora are computed by PEFT, which is not installed; run `pip install "
            "metatt-scale[peft]`"
        ) from None
    return peft


class PeftAdapter(Adapter):
    """The owner of what PEFT's layers train."""

    parts: tuple[str, ...] = ()
    """Attributes of PEFT's layers that are trained."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: AdapterRecipe,
        target_map: TargetMap,
        seed: int,
        device: torch.device,
    ) -> None:
        """Freeze the model and put PEFT's layers into it; their random values follow from the seed."""
        super().__init__(target_map, compute_dtype(model))
        self.recipe = recipe
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _stand_ins(model, self, device):
            warnings.simplefilter("ignore")  # about Conv1D, and tied weights that no target is
            torch.manual_seed(seed)
            tuner = self._put_layers(model, seed)
        # In tuples: no nn.Module may take the model, or layers inside it, for a part of the adapter.
        self._tuner = (tuner,)
        self._layers = tuple(model.get_submodule(target.path) for target in self.targets)
        self._mark_trained()

    def _put_layers(self, model: PreTrainedModel, seed: int) -> nn.Module:
        """Let PEFT put its layers into the model, and return what it calls a tuner."""
        raise NotImplementedError

    def _shared_settings(self) -> dict[str, Any]:
        return {
            "target_modules": [target.path for target in self.targets],
            "fan_in_fan_out": any(target.transposed for target in self.targets),
        }

    def _mark_trained(self) -> None:
        mine = {id(parameter) for parameter in self.trained().values()}
        for layer in self._layers:
            for name, parameter in layer.named_parameters():
                if not name.startswith("base_layer."):
                    parameter.requires_grad_(id(parameter) in mine)

    def layer_and_path(self) -> list[tuple[Any, str]]:
        """Return PEFT's layer of every target, and the target's path."""
        return [(layer, target.path) for layer, target in zip(self._layers, self.targets, strict=True)]

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters as `PATH.lora_A` and so on."""
        return {
            f"{path}.{part}": _parameter(getattr(layer, part)[TRAINED])
            for layer, path in self.layer_and_path()
            for part in self.parts
        }

    def enable(self, enabled: bool) -> None:
        """Switch PEFT's layers on or off."""
        super().enable(enabled)
        for layer, _ in self.layer_and_path():
            layer.enable_adapters(enabled)
        self._mark_trained()  # PEFT has its own idea of what asks for gradients

    def describe(self) -> dict[str, Any]:
        """Return rank and scale; the recipe, which stands beside it, has the rest."""
        return {"ranks": [initial_rank(self.recipe)], "alpha": self.recipe.alpha}

    def summary(self) -> str:
        """Return kind and rank for a person."""
        start = f", {self.recipe.init}" if self.recipe.init else ""
        return f"{self.recipe.kind}, rank {initial_rank(self.recipe)}{start}"


class Lora(PeftAdapter):
    """LoRA (Hu et al. 2022): y = x W^T + alpha / r x A^T B^T.

    PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) start at factors A0, B0 of the frozen weight itself, and take
    alpha / r B0 A0 off the weight. Packed and sharded weights cannot be rewritten without loss, so here the frozen
    weight stays as it is and the fixed product is taken off the output, by a second pair of factors that PEFT adds
    with the opposite sign:

        y = x W^T + alpha / r (x A^T B^T - x A0^T B0^T)

    Step 0 is the frozen model, and an adapter never depends on an SVD that is computed again.
    """

    parts = ("lora_A", "lora_B")

    def _put_layers(self, model: PreTrainedModel, seed: int) -> nn.Module:
        peft, recipe = import_peft(), self.recipe
        settings = {"r": recipe.rank, **self._shared_settings()}
        random = "gaussian" if recipe.init == "gaussian" else True
        config = peft.LoraConfig(lora_alpha=recipe.alpha, init_lora_weights=random, **settings)
        tuner = peft.LoraModel(model, config, TRAINED)
        if self.has_start:
            opposite = peft.LoraConfig(lora_alpha=-recipe.alpha, **settings)
            peft.inject_adapter_in_model(opposite, model, START)
            for target in self.targets:
                model.get_submodule(target.path).set_adapter([TRAINED, START])  # type: ignore[operator]
        return tuner

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

    def start_at(self, factors: Mapping[str, Tensor]) -> None:
        """Begin at these A0 and B0, by the names of `kept`."""
        self.set_values(dict(factors) | {name.replace(".start_", ".lora_"): value for name, value in factors.items()})


class Vera(PeftAdapter):
    """VeRA (Kopiczko et al. 2024): y = x W^T + ((x A^T) * d) B^T * b, with A and B random, frozen and shared by all.

    A and B are as wide as the widest target; narrower ones use their first columns and rows. The adapter's files keep
    them: they follow from the seed, but another version of torch may draw other numbers.
    """

    parts = ("vera_lambda_d", "vera_lambda_b")

    def _put_layers(self, model: PreTrainedModel, seed: int) -> nn.Module:
        peft, recipe = import_peft(), self.recipe
        start = recipe.vera.d_initial if recipe.vera else 0.1
        settings = {"r": recipe.rank, "d_initial": start, "projection_prng_key": seed, **self._shared_settings()}
        return peft.VeraModel(model, peft.VeraConfig(**settings), TRAINED)

    def kept(self) -> dict[str, Tensor]:
        """Return the shared projections."""
        tuner: Any = self._tuner[0]
        return {"vera_A": tuner.vera_A[TRAINED], "vera_B": tuner.vera_B[TRAINED]}

    def describe(self) -> dict[str, Any]:
        """Return the rank; VeRA has no scale."""
        return {"ranks": [initial_rank(self.recipe)]}


@contextlib.contextmanager
def _stand_ins(model: nn.Module, adapter: Adapter, device: torch.device) -> Iterator[None]:
    """Replace the targets inside a `with` block by linears of the same widths without storage."""
    dtype = torch.promote_types(adapter.compute_dtype, torch.float32)
    real = {}
    for target in adapter.targets:
        with torch.device("meta"):
            shape = (target.d_in, target.d_out)
            linear = Conv1D(*reversed(shape)) if target.transposed else nn.Linear(*shape)
        zero = torch.zeros((), dtype=dtype, device=device)
        linear.weight = nn.Parameter(zero.expand(linear.weight.shape), requires_grad=False)
        real[target.path] = model.get_submodule(target.path)
        model.set_submodule(target.path, linear.train(model.training))
    try:
        yield
    except BaseException:
        for path, linear in real.items():
            model.set_submodule(path, linear)
        raise
    for path, linear in real.items():
        model.get_submodule(path).base_layer = linear


def _parameter(part: nn.Module | nn.Parameter) -> nn.Parameter:
    """Return the parameter of a part of PEFT's layer: itself, or the weight of a linear."""
    parameter = part.weight if isinstance(part, nn.Module) else part
    assert isinstance(parameter, nn.Parameter)
    return parameter
