"""Kinds of adapter that are no chain: recipes, random values, and their definitions as dense matrices."""

import functools
import math

import torch
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from metatt_scale.recipe import validate

TASKS = 3


def recipe_of(kind, *, tasks=1, classifier=None, **adapter):
    """A recipe that is only asked for its adapter."""
    text = {
        "output_dir": "unused",
        "backbone": {"path": "unused", "dtype": "float32"},
        "adapter": {"kind": kind, **adapter},
        "data": {"train": [{"path": "unused"}]},
    }
    if classifier is not None:
        text["classifier"] = classifier
        text["data"] |= {"format": "sentences", "text_fields": ["text"]}
    return validate(text, "test").model_copy(update={"tasks": dict.fromkeys(range(tasks))})


def randomise_values(adapter, seed=0, scale=0.3):
    """Give every trained parameter random values, so that none is zero or an identity."""
    generator = torch.Generator().manual_seed(seed)
    values = adapter.trained()
    adapter.set_values(
        {n: scale * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in values.items()}
    )


def dense_delta(recipe, target, values, task):
    """What a kind adds to one module's weight (input x output), by its definition, from parameters by name."""
    kind, alpha = recipe.adapter.kind, recipe.adapter.alpha
    own = {
        name.removeprefix(f"{target.path}."): v for name, v in values.items() if name.startswith(target.path + ".")
    }
    if kind == "mtl_lora":
        shares = torch.exp(own["weights"][task] / recipe.adapter.mtl_lora.temperature)
        parts = [
            s / shares.sum() * (own["A"] @ own["tasks"][task] @ b) for s, b in zip(shares, own["B"], strict=True)
        ]
        return alpha * sum(parts)
    if kind == "moe_lora":
        scores = torch.exp(own["tasks"][task] @ own["gate"])
        n, width = len(scores), len(own["B"]) // len(scores)
        cut = [slice(e * width, (e + 1) * width) for e in range(n)]
        return alpha * sum(scores[e] / scores.sum() * (own["A"][:, cut[e]] @ own["B"][cut[e]]) for e in range(n))
    a_IR, b_RO = (entries(own, letter, *sizes) for letter, sizes in shapes_of(recipe, target).items())
    return alpha * (a_IR @ b_RO)


def shapes_of(recipe, target):
    """Rows and columns of LoRETTA's two matrices."""
    assert recipe.adapter.kind == "loretta_rep"
    return {"A": (target.d_in, recipe.adapter.rank), "B": (recipe.adapter.rank, target.d_out)}


def entries(own, letter, rows, columns):
    """A folded matrix entry by entry: products of one matrix per core, chosen by the digits of the entry's number."""
    cores = [own[f"{letter}_{k}"] for k in range(sum(name.startswith(f"{letter}_") for name in own))]
    numbers, slices = torch.arange(rows * columns), []
    for core in reversed(cores):
        slices.insert(0, core[:, numbers % core.shape[1]].transpose(0, 1))  # of each entry, (left bond, right bond)
        numbers = numbers // core.shape[1]
    return functools.reduce(torch.matmul, slices).view(rows, columns)


def run_bottlenecks(plain, recipe, paths, values, ids):
    """Logits of the plain model with y + alpha (gelu(y A + a) B + b) for the output y of these modules."""
    hooks, width = [], recipe.adapter.loretta.bottleneck
    for path in paths:
        own = {name.removeprefix(f"{path}."): v for name, v in values.items() if name.startswith(path + ".")}

        def change(module, _, y, own=own):
            a_OR, b_RO = entries(own, "A", y.shape[-1], width), entries(own, "B", width, y.shape[-1])
            z = y @ a_OR + own["a"]
            return y + recipe.adapter.alpha * ((z / 2 * (1 + torch.erf(z / math.sqrt(2)))) @ b_RO + own["b"])

        hooks.append(plain.get_submodule(path).register_forward_hook(change))
    try:
        return plain(ids).logits
    finally:
        for hook in hooks:
            hook.remove()


def run_dense(plain, recipe, targets, values, ids, tasks):
    """Logits of the plain model, example by example with every target's weight replaced by W + delta of its task."""
    rows = []
    for row, task in zip(ids, tasks, strict=True):
        weights = {}
        for target in targets:
            module = plain.get_submodule(target.path)
            delta = dense_delta(recipe, target, values, task)
            weights[f"{target.path}.weight"] = module.weight + (delta if isinstance(module, Conv1D) else delta.mT)
        rows.append(functional_call(plain, weights, (row[None],), {}).logits)
    return torch.cat(rows)
