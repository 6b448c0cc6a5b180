"""The adapter on disk: `metatt.json` (what it is), `metatt.safetensors` (its cores) and, of a classifier,
`head.safetensors` (the frozen head it was trained under).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter.base import Adapter
from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.inject import attach, compute_dtype
from metatt_scale.adapter.modes import ChainSpec, check_order
from metatt_scale.adapter.targets import Target, TargetMap, is_linear, widths
from metatt_scale.files import save_tensors, sha256, write_json

CONFIG, WEIGHTS, HEAD = "metatt.json", "metatt.safetensors", "head.safetensors"
_FORMAT = 1


def save_adapter(
    folder: Path, adapter: Adapter, about: Mapping[str, Any], head: Mapping[str, Tensor] | None = None
) -> None:
    """Write tensors and description into an existing folder.

    Args:
        folder: where to.
        adapter: what was trained.
        about: base model, recipe and the like.
        head: parameters of the model, by name, that its files lack: a classifier's head.
    """
    tensors = {name: value.cpu().contiguous() for name, value in adapter.result().items()}
    save_tensors(folder / WEIGHTS, tensors)
    description = {
        "format": _FORMAT,
        **adapter.describe(),
        "trainable_parameters": adapter.n_trained,
        "layers": adapter.target_map.layers,
        "projections": adapter.target_map.projections,
        "targets": [asdict(target) for target in adapter.targets],
        "weights_sha256": sha256(folder / WEIGHTS),
        **about,
    }
    if head is not None:
        save_tensors(folder / HEAD, head)
        description["head_sha256"] = sha256(folder / HEAD)
    write_json(folder / CONFIG, description)


def read_description(folder: Path) -> dict[str, Any]:
    """Read `metatt.json` and check the hashes of the weights beside it.

    Raises:
        ValueError: not an adapter folder, unknown format, or damaged weights.
    """
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: not an adapter folder, it has no {CONFIG}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG}: not readable as JSON ({error}); take the adapter from a backup"
        ) from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{folder / CONFIG}: unknown adapter format; this version reads format {_FORMAT}")
    wanted = {WEIGHTS: description.get("weights_sha256")}
    if "head_sha256" in description:
        wanted[HEAD] = description["head_sha256"]
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing")
        if sha256(folder / name) != digest:
            raise ValueError(f"{folder / name}: its hash differs from the one in {CONFIG}; the file is damaged")
    return description


def read_adapter(folder: Path) -> ChainAdapter:
    """Read a saved adapter without a backbone: enough for its exact LoRA form.

    Raises:
        ValueError: damaged files.
    """
    description = read_description(folder)
    try:
        cores = load_file(folder / WEIGHTS)
        spec, target_map, alpha = _parse(description)
        ordered = [cores[f"core_{k}"].to(torch.float32) for k in range(len(spec.modes))]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: damaged adapter ({error!r})") from None
    found = tuple(tuple(core.shape) for core in ordered)
    if found != spec.shapes:
        raise ValueError(f"{folder}: {CONFIG} describes cores of shapes {spec.shapes}, {WEIGHTS} holds {found}")
    return ChainAdapter(spec, ordered, alpha, target_map, torch.float32)


def load_adapter(folder: Path, model: PreTrainedModel) -> ChainAdapter:
    """Attach a saved adapter to a freshly loaded backbone, and give that the head it was trained under.

    Raises:
        ValueError: damaged files, or a model whose modules do not fit the adapter's targets or its head.
    """
    adapter = read_adapter(folder)
    make_fit(model, adapter.target_map, folder)
    adapter.compute_dtype = compute_dtype(model)
    attach(model, adapter)
    return adapter


def make_fit(model: PreTrainedModel, target_map: TargetMap, folder: Path) -> None:
    """Check that a model has the modules an adapter was made for, and give it the head it was trained under.

    Raises:
        ValueError: other modules, or another head.
    """
    _check_fit(model, target_map, folder)
    if "head_sha256" in read_description(folder):
        _put_head(model, folder)


def _put_head(model: PreTrainedModel, folder: Path) -> None:
    try:
        head = load_file(folder / HEAD)
    except SafetensorError as error:
        raise ValueError(f"{folder / HEAD}: damaged ({error!r})") from None
    parameters = dict(model.named_parameters())
    for name, value in head.items():
        found = tuple(parameters[name].shape) if name in parameters else "none of that name"
        if found != tuple(value.shape):
            raise ValueError(
                f"{folder / HEAD}: holds {name} of shape {tuple(value.shape)}, but {type(model).__name__} has {found}"
                "; load the backbone with the recipe's `classifier`"
            )
        with torch.no_grad():
            parameters[name].copy_(value)


def _parse(description: Mapping[str, Any]) -> tuple[ChainSpec, TargetMap, float]:
    """Return what `metatt.json` describes; whatever it raises on a file that was edited means "damaged"."""
    spec = ChainSpec(**{key: tuple(description[key]) for key in ("modes", "sizes", "ranks")})
    check_order(spec.modes, "metatt_5d" if "head" in spec.modes else "metatt_4d")
    target_map = saved_targets(description)
    size = dict(zip(spec.modes, spec.sizes, strict=True))
    widest = size["output"] * size.get("head", 1)
    for target in target_map.targets:
        inside = 0 <= target.layer < size["layer"] and 0 <= target.projection < size["projection"]
        if not (inside and 0 < target.d_in <= size["input"] and 0 < target.d_out <= widest):
            raise ValueError(f"target {target} does not lie in a chain of sizes {size}")
    if len(spec.ranks) != len(spec.modes) - 1 or not target_map.targets:
        raise ValueError(f"{len(spec.ranks)} ranks for {len(spec.modes)} modes, {len(target_map.targets)} targets")
    alpha = float(description["alpha"])
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}")
    return spec, target_map, alpha


def saved_targets(description: Mapping[str, Any]) -> TargetMap:
    """Return the targets that `metatt.json` lists; raises KeyError or TypeError where it was edited."""
    return TargetMap(
        targets=tuple(Target(**target) for target in description["targets"]),
        layers=tuple(description["layers"]),
        projections=tuple(description["projections"]),
    )


def _check_fit(model: nn.Module, target_map: TargetMap, folder: Path) -> None:
    modules = dict(model.named_modules())
    for target in target_map.targets:
        module = modules.get(str(target.path))
        found = widths(module) if module is not None and is_linear(module) else None
        if found != (target.d_in, target.d_out):
            has = "no such linear module" if found is None else f"{found[0]} -> {found[1]}"
            raise ValueError(
                f"{folder}: made for a model whose {target.path} is {target.d_in} -> {target.d_out}, but this model "
                f"has {has} there; load it on the backbone it was trained on"
            )
