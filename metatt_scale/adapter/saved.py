"""The adapter on disk: `metatt.json` (what it is) and `metatt.safetensors` (its cores)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.inject import attach, compute_dtype
from metatt_scale.adapter.modes import ChainSpec
from metatt_scale.adapter.targets import Target, TargetMap, is_linear, widths
from metatt_scale.files import sha256, write_json
from metatt_scale.tensor import check_chain

CONFIG, WEIGHTS = "metatt.json", "metatt.safetensors"
_FORMAT = 1


def save_adapter(folder: Path, adapter: ChainAdapter, about: Mapping[str, Any]) -> None:
    """Write cores and description into an existing folder; `about` records base model, recipe and the like."""
    cores = {f"core_{k}": core.detach().cpu().contiguous() for k, core in enumerate(adapter.cores)}
    save_file(cores, folder / WEIGHTS, metadata={"format": "pt"})
    description = {
        "format": _FORMAT,
        "modes": adapter.spec.modes,
        "sizes": adapter.spec.sizes,
        "ranks": adapter.spec.ranks,
        "alpha": adapter.alpha,
        "trainable_parameters": adapter.spec.n_parameters,
        "layers": adapter.target_map.layers,
        "projections": adapter.target_map.projections,
        "targets": [asdict(target) for target in adapter.targets],
        "weights_sha256": sha256(folder / WEIGHTS),
        **about,
    }
    write_json(folder / CONFIG, description)


def read_description(folder: Path) -> dict[str, Any]:
    """Read `metatt.json` and check the hash of the weights beside it.

    Raises:
        ValueError: not an adapter folder, unknown format, or damaged weights.
    """
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: not an adapter folder, it has no {CONFIG}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: not readable as JSON ({error}); take the adapter from a backup"
        ) from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{folder / CONFIG}: unknown adapter format; this version reads format {_FORMAT}")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: {WEIGHTS} is missing")
    if sha256(folder / WEIGHTS) != description.get("weights_sha256"):
        raise ValueError(f"{folder / WEIGHTS}: its hash differs from the one in {CONFIG}; the file is damaged")
    return description


def read_adapter(folder: Path) -> ChainAdapter:
    """Read a saved adapter without a backbone: enough for its exact LoRA form.

    Raises:
        ValueError: damaged files.
    """
    description = read_description(folder)
    try:
        cores = load_file(folder / WEIGHTS)
        spec = ChainSpec(**{key: tuple(description[key]) for key in ("modes", "sizes", "ranks")})
        target_map = TargetMap(
            targets=tuple(Target(**target) for target in description["targets"]),
            layers=tuple(description["layers"]),
            projections=tuple(description["projections"]),
        )
        ordered = [cores[f"core_{k}"].to(torch.float32) for k in range(len(spec.modes))]
        check_chain(ordered)
        alpha = float(description["alpha"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged adapter ({error!r})") from None
    if tuple(tuple(core.shape) for core in ordered) != spec.shapes:
        raise ValueError(f"{folder}: the cores' shapes differ from the description {spec.shapes}")
    return ChainAdapter(spec, ordered, alpha, target_map, torch.float32)


def load_adapter(folder: Path, model: PreTrainedModel) -> ChainAdapter:
    """Attach a saved adapter to a freshly loaded backbone.

    Raises:
        ValueError: damaged files, or a model whose modules do not fit the adapter's targets.
    """
    adapter = read_adapter(folder)
    _check_fit(model, adapter.target_map, folder)
    adapter.compute_dtype = compute_dtype(model)
    attach(model, adapter)
    return adapter


def _check_fit(model: nn.Module, target_map: TargetMap, folder: Path) -> None:
    modules = dict(model.named_modules())
    for target in target_map.targets:
        module = modules.get(target.path)
        found = widths(module) if module is not None and is_linear(module) else None
        if found != (target.d_in, target.d_out):
            has = "no such linear module" if found is None else f"{found[0]} -> {found[1]}"
            raise ValueError(
                f"{folder}: made for a model whose {target.path} is {target.d_in} -> {target.d_out}, but this model "
                f"has {has} there; load it on the backbone it was trained on"
            )
