"""Adapters in the formats others read: PEFT's LoRA, a merged transformers folder, our own cores.

Each export is a whole folder with a model card, written beside and renamed into place.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from metatt_scale.adapter import plain_linear
from metatt_scale.adapter.saved import CONFIG, HEAD, WEIGHTS
from metatt_scale.evaluation import read_scores
from metatt_scale.files import new_folder, write_json, write_text
from metatt_scale.methods import merged_layers, peft_files
from metatt_scale.recipe import Recipe
from metatt_scale.reopen import Reopened, adapter_folder, fingerprint, read_recipe, reopen, run_folder

_MARKER = "metatt_export.json"
FORMATS = ("lora", "merged", "metatt")


def export(
    path: str | Path,
    to: str,
    console: Console,
    *,
    out: str | Path | None = None,
    merge_base: str = "original",
    backbone: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write one export of a run or adapter folder and return its folder.

    Args:
        path: run directory or adapter folder.
        to: `lora` (exact PEFT checkpoint), `merged` (plain transformers folder) or `metatt` (the cores).
        console: progress.
        out: target folder; `RUN/exports/FORMAT` when absent.
        merge_base: merge onto the `original` weights, or onto the `dequantised` 4- or 8-bit ones trained against.
        backbone: keys of the recipe's `backbone` section to replace, for example its `path` on this machine.
        replace: overwrite an existing export.

    Raises:
        ValueError: unknown format, damaged adapter, or merged weights that are not finite.
        FileExistsError: the target exists and `replace` is false.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    source = adapter_folder(path)
    target = Path(out).expanduser() if out is not None else run_folder(source) / "exports" / to
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already; remove it, choose --out, or pass --replace")
    if target.exists() and not (target / _MARKER).is_file():
        raise FileExistsError(f"{target} is no export of this toolkit, so --replace leaves it alone; choose --out")
    description, recipe = read_recipe(source, backbone)
    with new_folder(target, replace=replace) as temporary:
        if to == "metatt":
            for name in (CONFIG, WEIGHTS, *([HEAD] if "head_sha256" in description else [])):
                shutil.copyfile(source / name, temporary / name)
        elif to == "lora":
            _write_lora(source, recipe, temporary)
        else:
            plain = {"quantization": "none"} if merge_base == "original" else {}
            _write_merged(reopen(path, console, {**(backbone or {}), **plain}), temporary)
        write_json(temporary / _MARKER, {"format": to, "weights_sha256": description["weights_sha256"]})
        write_text(temporary / "README.md", model_card(source, description, recipe, to, merge_base))
    console.print(f"{to} export: {target}", highlight=False)
    return target


def _write_lora(source: Path, recipe: Recipe, folder: Path) -> None:
    if recipe.classifier is not None:
        raise ValueError(
            "--to lora: this run is a classifier, whose head a LoRA folder of ours does not hold yet; use --to merged"
        )
    config, state = peft_files(source, recipe)  # the factors need no backbone
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise ValueError(f"{source}: the LoRA factors are not finite; the adapter's cores are damaged or overflow")
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def _write_merged(opened: Reopened, folder: Path) -> None:
    make_plain(opened)
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def make_plain(opened: Reopened) -> None:
    """Turn a model into an ordinary one: the adapter merged into its linears, nothing quantised."""
    model, adapter = opened.model, opened.adapter
    for path, linear in merged_layers(adapter).items():
        _put(model, path, linear)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:  # a bitsandbytes linear
            _put(model, path, plain_linear(module, adapter.compute_dtype))


def _put(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def model_card(source: Path, description: dict[str, Any], recipe: Recipe, to: str, merge_base: str) -> str:
    """Return the README of an export: base, recipe, data, counts and the scores on record."""
    form = "VeRA" if recipe.adapter.kind == "vera" else "LoRA"
    kinds = {
        "lora": f"the exact {form} form for PEFT (`adapter_config.json` + `adapter_model.safetensors`)",
        "merged": f"a plain transformers model, merged onto the {merge_base} weights",
        "metatt": "what was trained (`metatt.json` + `metatt.safetensors`), for metatt-scale",
    }
    counted = "examples" if recipe.classifier else "target tokens"
    alpha = f"; alpha {description['alpha']}" if "alpha" in description else ""
    lines = [
        "---",
        f"base_model: {json.dumps(description['base_model'])}",
        "library_name: " + {"lora": "peft", "merged": "transformers", "metatt": "metatt_scale"}[to],
        "tags: [metatt, tensor-train, lora]" if recipe.adapter.is_chain else f"tags: [{form.lower()}]",
        "---",
        "",
        f"# {description['kind']} adapter for {description['base_model']}",
        "",
        f"This folder holds {kinds[to]}.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {description['base_model']} (quantization {recipe.backbone.quantization}) |",
        f"| adapter | {_form(description)}; ranks {', '.join(map(str, description['ranks']))}{alpha} |",
        f"| trained parameters | {description['trainable_parameters']:,} |",
        f"| adapted modules | {len(description['targets'])} ({', '.join(description['projections'])}) |",
        f"| data | {', '.join(description['records'])} ({description['target_tokens']:,} {counted}) |",
        f"| training | {description['step']} steps of {recipe.training.batch_size} examples, learning rate "
        f"{recipe.training.learning_rate}, seed {recipe.seed} |",
        f"| made with | metatt-scale {description['metatt_scale']} |",
        "",
        *_score_lines(run_folder(source) / "results.json", recipe, description["weights_sha256"]),
    ]
    return "\n".join(lines) + "\n"


def _form(description: dict[str, Any]) -> str:
    """Return modes and sizes of a chain, the kind of everything else."""
    if "modes" not in description:
        return description["kind"]
    sizes = zip(description["modes"], description["sizes"], strict=True)
    return "chain " + " x ".join(f"{mode} {size}" for mode, size in sizes)


def _score_lines(results: Path, recipe: Recipe, adapter_sha256: str) -> list[str]:
    """Return the scores on record that are this adapter's and its backbone's, and nobody else's."""
    known = {fingerprint(recipe, None), fingerprint(recipe, adapter_sha256)}
    rows = []
    for label, tasks in (read_scores(results) if results.is_file() else {}).items():
        for task, score in tasks.items():
            if score.key.get("fingerprint") in known:
                for metric in score.samples:
                    mean, error = score.mean(metric), score.stderr(metric)
                    shown = f"{error:.4f}" if math.isfinite(error) else "-"
                    rows.append(f"| {label} | {task} | {metric} | {mean:.4f} | {shown} | {score.n} |")
    if not rows:
        return ["No scores on record."]
    return ["## Scores", "", "| model | task | metric | score | ± | questions |", "|---|---|---|---|---|---|", *rows]
