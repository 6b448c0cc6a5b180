"""Adapters in the formats others read: PEFT's LoRA, a merged transformers folder, our own cores.

Each export is a whole folder with a model card, written beside and renamed into place.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter import HeadLinear, merge, peft_config, peft_state, plain_linear, read_head
from metatt_scale.adapter.saved import CONFIG, HEAD, WEIGHTS
from metatt_scale.backbone import identity, last_linear
from metatt_scale.evaluation import read_scores
from metatt_scale.files import new_folder, write_json, write_text
from metatt_scale.hardware import pick_device
from metatt_scale.methods import read_alone
from metatt_scale.paths import check_no_file_in_the_way, user_path
from metatt_scale.recipe import INNER_BONDS, Recipe, label_rows
from metatt_scale.reopen import Reopened, adapter_folder, fingerprint, read_recipe, reopen, run_folder, task_index

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
    task: str | None = None,
    device: str = "auto",
) -> Path:
    """Write one export of a run or adapter folder and return its folder.

    Args:
        path: run directory or adapter folder.
        to: `lora` (exact PEFT checkpoint), `merged` (plain transformers folder) or `metatt` (our own files).
        console: progress.
        out: target folder; `RUN/exports/FORMAT` when absent.
        merge_base: merge onto the `original` weights, or onto the `dequantised` 4- or 8-bit ones trained against.
        backbone: keys of the recipe's `backbone` section to replace, for example its `path` on this machine.
        replace: overwrite an existing export.
        task: name of the task whose weights and labels are meant, where there are several (`lora`, `merged`).
        device: `auto`, `cpu` or `cuda`: where `merged` is computed; the others need no model.

    Raises:
        ValueError: unknown format, damaged adapter, or merged weights that are not finite.
        FileExistsError: the target exists and `replace` is false.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    source = adapter_folder(path)
    target = user_path(out, "--out") if out is not None else run_folder(source) / "exports" / to
    _check_target(target, replace)
    description, recipe = read_recipe(source, backbone)
    chosen = _chosen_task(recipe, task, to)
    with new_folder(target, replace=replace) as temporary:
        if to == "metatt":
            _copy(source, temporary, description)
        elif to == "lora":
            _write_lora(source, recipe, temporary, chosen)
        else:
            plain = {"quantization": "none"} if merge_base == "original" else {}
            here = pick_device(device, console, recipe.backbone.dtype)
            _write_merged(reopen(path, console, here, {**(backbone or {}), **plain}), temporary, chosen)
        write_json(temporary / _MARKER, {"format": to, "weights_sha256": description["weights_sha256"]})
        write_text(temporary / "README.md", model_card(source, description, recipe, to, merge_base, chosen))
    console.print(f"{to} export: {target}", highlight=False)
    return target


def _check_target(target: Path, replace: bool) -> None:
    check_no_file_in_the_way(target, "--out")
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already; remove it, choose --out, or pass --replace")
    if target.exists() and not (target / _MARKER).is_file():
        raise FileExistsError(f"{target} is no export of this toolkit, so --replace leaves it alone; choose --out")


def _chosen_task(recipe: Recipe, task: str | None, to: str) -> int | None:
    if to == "metatt" and task is not None:
        raise ValueError(f"--task is {task}, but a metatt folder holds the adapter of all tasks; leave --task out")
    return task_index(recipe, task)


def _copy(source: Path, folder: Path, description: Mapping[str, Any]) -> None:
    for name in (CONFIG, WEIGHTS, *([HEAD] if "head_sha256" in description else [])):
        shutil.copyfile(source / name, folder / name)


def _write_lora(source: Path, recipe: Recipe, folder: Path, task: int | None) -> None:
    adapter, head = read_alone(source, recipe), read_head(source)  # the factors need no backbone
    adapter.task = task
    if adapter.head is not None:
        head = {name: value.detach() for name, value in adapter.head.named("").items()}
    state = peft_state(adapter, head_of_task(head, recipe, task) if head else None)
    bad = next((name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())), None)
    if bad is not None:
        raise ValueError(f"{source}: {bad} is not finite; the adapter's tensors or head are damaged or overflow")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config(adapter, recipe.backbone.path, head))


def _write_merged(opened: Reopened, folder: Path, task: int | None) -> None:
    opened.adapter.task = task
    merge(opened.adapter)
    make_plain(opened)
    if opened.recipe.classifier is not None and task is not None:
        _keep_labels(opened.model, opened.recipe, task)
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def head_of_task(head: Mapping[str, Tensor], recipe: Recipe, task: int | None) -> dict[str, Tensor]:
    """Return the tensors of a head, of its last linear only the rows of one task (all where none is given)."""
    if task is None:
        return dict(head)
    own, last = list(label_rows(recipe.label_sets).values())[task], last_linear(head)
    return {name: value[own].clone() if name.rpartition(".")[0] == last else value for name, value in head.items()}


def _keep_labels(model: PreTrainedModel, recipe: Recipe, task: int) -> None:
    """Leave the labels of one task in a classifier's head."""
    path = last_linear(name for name, _ in model.named_parameters())
    last = model.get_submodule(path)
    assert isinstance(last, nn.Linear)
    kept = head_of_task({f"{path}.{name}": value for name, value in last.named_parameters()}, recipe, task)
    for name, value in kept.items():
        setattr(last, name.rpartition(".")[2], nn.Parameter(value.detach(), requires_grad=False))
    last.out_features = model.config.num_labels = last.weight.shape[0]
    model.config.problem_type = "regression" if last.out_features == 1 else None


def make_plain(opened: Reopened) -> None:
    """Turn a merged model into an ordinary one: merged linears in their places, nothing quantised."""
    model, adapter = opened.model, opened.adapter
    for linear, target in zip(adapter.linears, adapter.targets, strict=True):
        assert linear.merged_layer is not None, "merge first"
        _put(model, target.path, linear.merged_layer)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:  # a bitsandbytes linear
            _put(model, path, plain_linear(module, adapter.compute_dtype))
        if isinstance(module, HeadLinear):
            _put(model, path, module.as_linear(adapter.compute_dtype))


def _put(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def model_card(
    source: Path, description: dict[str, Any], recipe: Recipe, to: str, merge_base: str, task: int | None
) -> str:
    """Return the README of an export: base, recipe, data, counts and the scores on record."""
    form = "VeRA" if recipe.adapter.kind == "vera" else "LoRA"
    kinds = {
        "lora": f"the exact {form} form of the adapter (PEFT `adapter_config.json` + `adapter_model.safetensors`)",
        "merged": f"a plain transformers model, merged onto the {merge_base} weights",
        "metatt": "the adapter's own tensors (`metatt.json` + `metatt.safetensors`), for metatt-scale",
    }
    counted = "examples" if recipe.classifier else "target tokens"
    in_head = description.get("head_parameters", 0)  # of adapters saved before heads were trained there is no count
    head = f" and {in_head:,} of the head" if in_head else ""
    lines = [
        "---",
        f"base_model: {json.dumps(description['base_model'])}",
        "library_name: " + {"lora": "peft", "merged": "transformers", "metatt": "metatt_scale"}[to],
        f"tags: [{_tags(recipe, form)}]",
        "---",
        "",
        f"# {description['kind']} adapter for {description['base_model']}",
        "",
        f"This folder holds {kinds[to]}.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {description['base_model']} (quantization {recipe.backbone.quantization}) |",
        f"| adapter | {description.get('summary', description['kind'])}; alpha {description['alpha']} |",
        f"| trained parameters | {description['trainable_parameters']:,}{head} |",
        *_label_lines(recipe, to, task),
        *_module_lines(description),
        f"| data | {', '.join(dict.fromkeys(description['records']))} ({description['target_tokens']:,} {counted}) |",
        f"| training | {description['step']} steps of {recipe.training.batch_size} examples, learning rate "
        f"{recipe.training.learning_rate}, seed {recipe.seed} |",
        f"| made with | metatt-scale {description['metatt_scale']} |",
        "",
        *_score_lines(run_folder(source) / "results.json", recipe, description["weights_sha256"], task),
    ]
    return "\n".join(lines) + "\n"


def _tags(recipe: Recipe, form: str) -> str:
    if recipe.adapter.kind in INNER_BONDS:
        return "metatt, tensor-train, lora"
    return recipe.adapter.kind if recipe.adapter.kind in ("full", "head_only") else form.lower()


def _module_lines(description: Mapping[str, Any]) -> list[str]:
    names = ", ".join(description["projections"])
    return [f"| adapted modules | {len(description['targets'])} ({names}) |"] if description["targets"] else []


def _label_lines(recipe: Recipe, to: str, task: int | None) -> list[str]:
    if recipe.classifier is None:
        return [] if task is None else [f"| task | {list(recipe.tasks)[task]} |"]
    kind = "; ".join(
        f"{f'{name}: ' if name else ''}{'one number (regression)' if of.is_regression else f'{of.labels} classes'}"
        for index, (name, of) in enumerate(recipe.label_sets.items())
        if task is None or index == task
    )
    outputs = list(recipe.label_sets.values())[task].labels if task is not None else recipe.head_outputs
    load = f"AutoModelForSequenceClassification.from_pretrained(..., num_labels={outputs})"
    start = "that was trained" if recipe.classifier.head == "trained" else "at its random start"
    onto = f"; load this folder on `{load}`" if to == "lora" else ""
    return [f"| labels | {kind}, by a head {start}, which is in this folder{onto} |"]


def _score_lines(results: Path, recipe: Recipe, adapter_sha256: str, task: int | None) -> list[str]:
    """Return the scores on record that are this adapter's and its backbone's, and nobody else's."""
    recorded = read_scores(results)
    if not recorded:
        return ["No scores on record."]
    tasks = range(len(recipe.tasks)) if task is None else [task]
    of = functools.partial(fingerprint, recipe, identity(recipe.backbone))
    known = {of(None), *(of(adapter_sha256, chosen) for chosen in (None, *tasks))}
    rows = []
    for label, scores in recorded.items():
        for benchmark, score in scores.items():
            if score.key.get("fingerprint") in known:
                for metric in score.samples:
                    mean, error = score.mean(metric), score.stderr(metric)
                    shown = f"{error:.4f}" if math.isfinite(error) else "-"
                    rows.append(f"| {label} | {benchmark} | {metric} | {mean:.4f} | {shown} | {score.n} |")
    if not rows:
        return ["No scores on record."]
    return ["## Scores", "", "| model | task | metric | score | ± | questions |", "|---|---|---|---|---|---|", *rows]
