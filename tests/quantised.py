"""Tiny models packed to 4 and 8 bits, and what tests ask of them."""

import copy

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

from metatt_scale.adapter import inject
from metatt_scale.backbone.quantised import linears_to_pack, pack
from metatt_scale.recipe import AdapterRecipe, BackboneRecipe
from tests.tiny import MODELS, WIDE, randomise, tiny_model
from tests.toy import CPU

OPT = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}


def recipe_of(quantization, **changes):
    return BackboneRecipe(path="unused", quantization=quantization, **{"dtype": "float32", **changes})


def wide_model(name="llama", dtype=torch.float32):
    return tiny_model(name, dtype=dtype, **{"gpt2": {}, "opt": OPT}.get(name, WIDE))


def quantise(model, recipe):
    """Pack a whole model at once, in place."""
    pack(model, linears_to_pack(model, recipe, CPU), recipe, CPU)


def packed_model(quantization, name="llama", dtype=torch.float32, **changes):
    """A tiny model packed by our own code, in train mode, and the same model on the weights it stands for."""
    model = wide_model(name, dtype)
    unpacked = copy.deepcopy(model)
    quantise(model, recipe_of(quantization, **changes))
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            unpacked.get_submodule(path).weight.data = as_numbers(module, dtype)
    return model, unpacked


def as_numbers(module, dtype):
    """The weight a packed layer computes with, read off its answers to the unit vectors (exact: x 1, + 0)."""
    with torch.no_grad():
        rows = module(torch.eye(module.in_features, dtype=dtype)[None])[0]
        if module.bias is not None:
            rows -= module(torch.zeros(1, 1, module.in_features, dtype=dtype))[0]
    return rows.mT.contiguous()


def adapt(model, name="llama", **changes):
    recipe = AdapterRecipe(**{"rank": 4, "alpha": 1.7, "target_modules": tuple(MODELS[name][3]), **changes})
    adapter = inject(model, recipe, 0, CPU)
    randomise(adapter)
    return adapter


def snapshot(model):
    """Every tensor of the state as bytes: packed bits read as floats may be NaN, which equals nothing."""
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in model.state_dict().items()}


def same_bits(model, before):
    after = snapshot(model)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
