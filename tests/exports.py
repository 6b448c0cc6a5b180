"""Runs to export from, on tiny saved models."""

import json

import torch
from rich.console import Console

from metatt_scale.adapter import inject, save_adapter
from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.files import write_text
from metatt_scale.recipe import dump_recipe, validate
from tests.tiny import randomise, tiny_model, tokens
from tests.toy import CPU

QUIET = Console(quiet=True)


def save_backbone(folder, name="llama", **changes):
    changes = {"vocab_size": 300, **changes}
    tiny_model(name, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(tmp_path, backbone=None, adapter=None):
    data = tmp_path / "sums.jsonl"
    lines = [{"instruction": f"{a}+{b}", "input": "", "output": f"={a + b}"} for a in range(6) for b in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return validate(
        {
            "output_dir": str(tmp_path / "run"),
            "backbone": {"path": str(tmp_path / "backbone"), "dtype": "float32", **(backbone or {})},
            "adapter": {"rank": [3, 4, 5], "alpha": 1.5, **(adapter or {})},
            "data": {"train": [{"path": str(data)}], "template": "plain"},
            "training": {"batch_size": 12, "micro_batch_size": 12, "learning_rate": 0.02, "max_steps": 4},
        },
        "test",
    )


def untrained_run(tmp_path, name="llama", model=None, backbone=None, adapter=None):
    """A run directory as `train` leaves it, its cores random: (run directory, recipe, model with the adapter)."""
    save_backbone(tmp_path / "backbone", name, **(model or {}))
    recipe = recipe_of(tmp_path, backbone, adapter)
    adapted = load_backbone(recipe.backbone, CPU)
    chain = inject(adapted, recipe.adapter, 0, CPU)
    randomise(chain)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    about = {"base_model": recipe.backbone.path, "kind": recipe.adapter.kind, "step": 4, "target_tokens": 1234}
    about |= {"records": [s.path for s in recipe.data.train], "recipe": recipe.model_dump(mode="json")}
    save_adapter(run / "adapter", chain, {**about, "metatt_scale": "0"})
    write_text(run / "recipe.yaml", dump_recipe(recipe))
    return run, recipe, adapted


def logits_of(model):
    with torch.no_grad():
        return model(tokens(vocab=97)).logits.float()
