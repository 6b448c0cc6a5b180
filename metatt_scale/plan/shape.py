"""The sizes of a model that memory, wire and time are computed from, read off its module tree without weights.

Letters of this package: D hidden width, F inner width of the MLP, Q and K widths of all query and of all key heads,
H query heads, L layers, V vocabulary; B examples of a micro-batch, S tokens of each, N = B S rows; W ranks, Z ranks
that hold one copy of the backbone among them; e bytes of a value in the backbone's dtype. All sizes are bytes unless
a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from metatt_scale.adapter import ChainSpec, TargetMap, chain_spec, find_targets, head_dim_of
from metatt_scale.adapter.targets import is_linear, widths
from metatt_scale.backbone import load_skeleton
from metatt_scale.backbone.quantised import linears_to_pack
from metatt_scale.backbone.units import find_units
from metatt_scale.recipe import BackboneRecipe, Recipe

ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
"""Bytes of one value."""

_ANY_GPU = torch.device("cuda")
_LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_LLAMA_MODELS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One frozen tensor of the model."""

    path: str
    numel: int
    rows: int
    """Size of its first axis, along which FSDP2 shards."""
    packed: bool
    """The matrix of a linear that the recipe stores in 4 or 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Frozen tensors that are gathered together."""

    kind: str
    """`layer`, `embedding`, `head`, or `root` for what is left (tied embeddings, the last norm)."""
    path: str
    weights: tuple[Weight, ...]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Widths and counts of one model with the chain behind it."""

    family: str
    """`llama`: the activations' formulas are exact (Llama, Mistral, Qwen2, Qwen3); `generic`: an estimate."""
    hidden: int
    inner: int
    query: int
    key: int
    heads: int
    layers: int
    vocabulary: int
    """Logits of a position whose loss is taken; of a classifier: its labels."""
    head_norms: bool
    """Queries and keys pass a norm of their own (Qwen3)."""
    linear_outputs: int
    """Sum of the output widths of one layer's linears."""
    widest_linear: int
    """Values of the largest matrix of a layer."""
    layer_parameters: int
    """Values of one layer's matrices."""
    units: tuple[Unit, ...]
    buffer_bytes: int
    """Rotary frequencies and the like: on every rank."""
    target_map: TargetMap
    spec: ChainSpec


def read_shape(recipe: Recipe, model: PreTrainedModel | None = None) -> ModelShape:
    """Return the sizes of a recipe's model and chain; no weights, no GPU, no download where a configuration ships.

    Args:
        recipe: of a language model with a chain.
        model: its module tree, where that is there already.

    Raises:
        ValueError: no configuration for the backbone, or targets that match nothing.
    """
    labels = recipe.head_outputs
    model = model or load_skeleton(recipe.backbone, labels)
    target_map = find_targets(model, recipe.adapter.target_modules, recipe.adapter.layers)
    spec = chain_spec(recipe.adapter, target_map, head_dim_of(model), len(recipe.tasks))
    config = model.config.get_text_config()
    units = _units(model, recipe.backbone)
    first = model.get_submodule(next(unit.path for unit in units if unit.kind == "layer"))
    linears = {path: widths(module) for path, module in first.named_modules() if is_linear(module)}
    names = {path.rpartition(".")[2] for path in linears}
    heads = config.num_attention_heads
    query = heads * (head_dim_of(model) or config.hidden_size // heads)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    llama = config.model_type in _LLAMA_MODELS and names >= _LLAMA_LIKE
    return ModelShape(
        family="llama" if llama else "generic",
        hidden=config.hidden_size,
        inner=linears["mlp.gate_proj"][1] if llama else max(max(pair) for pair in linears.values()),
        query=query,
        key=query // heads * key_heads,
        heads=heads,
        layers=config.num_hidden_layers,
        vocabulary=labels or config.vocab_size,
        head_norms=any(path.endswith("q_norm") for path, _ in first.named_modules()),
        linear_outputs=sum(pair[1] for pair in linears.values()),
        widest_linear=max(d_in * d_out for d_in, d_out in linears.values()),
        layer_parameters=sum(d_in * d_out for d_in, d_out in linears.values()),
        units=units,
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        target_map=target_map,
        spec=spec,
    )


def _units(model: PreTrainedModel, recipe: BackboneRecipe) -> tuple[Unit, ...]:
    """Return the units that loading and sharding work with (backbone/units.py), the root's own tensors last."""
    # No device of ours: what bitsandbytes cannot compute on a CPU is no concern of counting.
    packable = set(linears_to_pack(model, recipe, _ANY_GPU)) if recipe.quantization != "none" else set()
    edges = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    seen: set[int] = set()
    units = []
    for path, module in [*find_units(model), ("", model)]:
        weights = []
        for name, parameter in module.named_parameters(prefix=path):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                owner, _, kind = name.rpartition(".")
                packed = kind == "weight" and owner in packable
                weights.append(Weight(path=name, numel=parameter.numel(), rows=parameter.shape[0], packed=packed))
        kind = "root" if module is model else edges.get(id(module), "layer")
        units.append(Unit(kind=kind, path=path, weights=tuple(weights)))
    return tuple(units)
