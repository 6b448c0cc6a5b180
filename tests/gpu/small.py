"""What the GPU tests train: a random Llama on additions, wide enough on a GPU for its usual kernels."""

import json
from pathlib import Path
from typing import Any

import torch

from metatt_scale.backbone import compile_layers
from metatt_scale.recipe import Recipe, validate
from metatt_scale.training.loop import Trainer
from tests.methods import randomise_values
from tests.toy import LLAMA, make_trainer, toy, write_toy

ON_CPU = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
"""The smallest widths that 4-bit kernels of a CPU unpack correctly."""
ON_GPU = {
    **LLAMA,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 2048,
    "initializer_range": 0.02,
}
"""Heads of width 64, matrices of several tiles."""
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
"""Three that read the same input, and one of another width."""
TASKS = ("a", "b")


def recipe_for(folder: Path, device: torch.device, **sections: Any) -> Recipe:
    """A recipe on records of different lengths, several micro-batches a step; `sections` are laid over it."""
    write_toy(folder, config=ON_CPU if device.type == "cpu" else ON_GPU)
    longest = 4 if device.type == "cpu" else 40
    sums = [(f"{i * 7 % 31}+{i}", f"{i * 7 % 31 + i} ", 1 + i % longest) for i in range(80)]
    records = [{"instruction": question, "output": "=" + answer * times} for question, answer, times in sums]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sections["training"] = {"micro_batch_size": 5, **sections.get("training", {})}
    sections["adapter"] = {"target_modules": TARGETS, **sections.get("adapter", {})}
    recipe = toy(folder, **sections)
    if recipe["adapter"].get("kind") == "metatt_4p1d":
        recipe["tasks"] = {task: {} for task in TASKS}
        recipe["data"]["train"] = [{"path": str(folder / "data.jsonl"), "task": task} for task in TASKS]
    return validate(recipe, "gpu test")


def trainer_for(recipe: Recipe, device: torch.device) -> Trainer:
    """The trainer of a recipe on a device, no value of its adapter zero or an identity; the same on every device."""
    trainer = make_trainer(recipe, None, device)
    # As large as the frozen outputs a delta would saturate the softmaxes, and a gradient lose digits to rounding.
    randomise_values(trainer.adapter, scale=0.1 if trainer.chain is not None else 0.03)
    if recipe.backbone.compile:
        compile_layers(trainer.model)
    return trainer


def first_gradient(recipe: Recipe, device: torch.device) -> dict[str, torch.Tensor]:
    """The loss of a recipe's first global batch and its gradient by parameter, on the host."""
    return gradient_of(trainer_for(recipe, device))


def gradient_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The same of a trainer at its start."""
    _, tokens, sums = trainer._gradient(0)
    found = {"loss": torch.tensor(sums.read().loss / tokens, dtype=torch.float64)}
    for name, parameter in trainer.adapter.trained().items():
        assert parameter.grad is not None and parameter.grad.device == parameter.device == trainer.world.device
        found[name] = parameter.grad.detach().to("cpu", torch.float64)
    return found


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative distance of the loss and of every gradient, in the norm; printed, for the report."""
    assert found.keys() == expected.keys()
    far = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    print("relative distances:", *(f"{name} {value:.1e}" for name, value in far.items()))
    return far
