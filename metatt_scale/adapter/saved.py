"""The adapter on disk: `metatt.json` (what it is), `metatt.safetensors` (its tensors, of a chain the cores)
and, of a classifier whose head is frozen, `head.safetensors` (the head it was trained under).
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

from metatt_scale.adapter.base import HEAD_PREFIX, Adapter
from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.inject import compute_dtype
from metatt_scale.adapter.leaves import Leaves
from metatt_scale.adapter.modes import KINDS, ChainSpec, check_order
from metatt_scale.adapter.targets import Target, TargetMap, is_linear, widths
from metatt_scale.files import save_tensors, sha256, write_json
from metatt_scale.paths import user_path

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
        head: parameters of the model, by name, that its files lack: a classifier's head, where it is frozen.
    """
    tensors = {name: value.cpu().contiguous() for name, value in adapter.result().items()}
    save_tensors(folder / WEIGHTS, tensors)
    description = {
        "format": _FORMAT,
        **adapter.describe(),
        "summary": adapter.summary(),
        "trainable_parameters": adapter.n_trained - adapter.n_head,
        "head_parameters": adapter.n_head,
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


def adapter_folder(path: str | Path) -> Path:
    """Return the adapter folder of a run directory, or the folder itself if it is one.

    Raises:
        ValueError: neither.
    """
    path = user_path(path)
    for candidate in (path / "adapter", path):
        if (candidate / CONFIG).is_file():
            return candidate
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run directory or an adapter folder")
    unfinished = " (the run has checkpoints but has not finished)" if (path / "checkpoints").is_dir() else ""
    raise ValueError(f"{path}: holds no adapter{unfinished}; give a finished run directory or an adapter folder")


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
        raise ValueError(
            f"{folder / CONFIG}: unknown adapter format; this version reads format {_FORMAT}: open it with the "
            "version that wrote it, or take the file from a backup"
        )
    wanted = {WEIGHTS: description.get("weights_sha256")}
    if "head_sha256" in description:
        wanted[HEAD] = description["head_sha256"]
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: {name} is missing; take it from a backup, or from another copy of the folder"
            )
        if sha256(folder / name) != digest:
            raise ValueError(
                f"{folder / name}: its hash differs from the one in {CONFIG}; the file is damaged: take it from a "
                "backup"
            )
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


def load_adapter(folder: Path, model: PreTrainedModel, device: torch.device) -> ChainAdapter:
    """Attach a saved chain to a freshly loaded backbone, and give that the head it was trained under.

    Args:
        folder: of the adapter.
        model: the backbone.
        device: where it computes.

    Raises:
        ValueError: damaged files, or a model whose modules do not fit the adapter's targets or its head.
    """
    adapter = read_adapter(folder)
    check_fit(model, adapter.target_map, folder)
    put_head(model, folder)
    adapter.compute_dtype = compute_dtype(model)
    adapter.attach(model, device)
    return adapter


def fill(adapter: Adapter, folder: Path) -> None:
    """Give an adapter that was made anew the values of a saved one.

    Raises:
        ValueError: a tensor is missing, or of another shape.
    """
    try:
        values = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged adapter ({error!r})") from None
    wanted = {name: tuple(value.shape) for name, value in adapter.result().items()}
    found = {name: tuple(value.shape) for name, value in values.items()}
    if found != wanted:
        name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{folder}: {WEIGHTS} holds {name} of shape {found.get(name, 'nothing')}, but the recipe in {CONFIG} "
            f"makes {wanted.get(name, 'nothing')}; the files do not belong together, take the adapter from a backup"
        )
    adapter.set_values(values)


def trained_head(folder: Path) -> Leaves | None:
    """Return the head that a saved adapter has trained; None where it has none.

    Raises:
        ValueError: damaged files.
    """
    try:
        values = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged adapter ({error!r})") from None
    head = {name.removeprefix(HEAD_PREFIX): v for name, v in values.items() if name.startswith(HEAD_PREFIX)}
    return Leaves(head) if head else None


def put_head(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the frozen head that a saved adapter was trained under, if it was.

    Raises:
        ValueError: a damaged file, or a model without such a head.
    """
    head = read_head(folder)
    if head is not None:
        set_head(model, head, f"{folder / HEAD}")


def read_head(folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a classifier's head by name; None where the adapter has none.

    Raises:
        ValueError: damaged files.
    """
    if "head_sha256" not in read_description(folder):
        return None
    try:
        return load_file(folder / HEAD)
    except SafetensorError as error:
        raise ValueError(f"{folder / HEAD}: damaged ({error!r})") from None


def set_head(model: PreTrainedModel, head: Mapping[str, Tensor], where: str) -> None:
    """Give a model the values of a head, by name; `where` they stand is for the error.

    Raises:
        ValueError: a model without such a head.
    """
    parameters = dict(model.named_parameters())
    for name, value in head.items():
        found = tuple(parameters[name].shape) if name in parameters else "none of that name"
        if found != tuple(value.shape):
            raise ValueError(
                f"{where}: holds {name} of shape {tuple(value.shape)}, but {type(model).__name__} has {found}"
                "; load the backbone with the recipe's `classifier`"
            )
        with torch.no_grad():
            parameters[name].copy_(value)


def _parse(description: Mapping[str, Any]) -> tuple[ChainSpec, TargetMap, float]:
    """Return what `metatt.json` describes; whatever it raises on a file that was edited means "damaged"."""
    modes, sizes, ranks = (tuple(description[key]) for key in ("modes", "sizes", "ranks"))
    diagonal, projections = bool(description.get("diagonal", False)), len(description["projections"])
    spec = ChainSpec(modes=modes, sizes=sizes, ranks=ranks, diagonal=diagonal, projections=projections)
    if not any(sorted(modes) == sorted(known) for known in KINDS.values()):
        raise ValueError(f"modes {modes} are those of no chain")
    check_order(modes, next(kind for kind, known in KINDS.items() if sorted(modes) == sorted(known)))
    target_map = _target_map(description)
    size = dict(zip(spec.modes, spec.sizes, strict=True))
    layers = size["site"] // projections if "site" in size else size["layer"]
    widest = size["output"] * size.get("head", 1)
    for target in target_map.targets:
        inside = 0 <= target.layer < layers and 0 <= target.projection < projections
        if not (inside and 0 < target.d_in <= size["input"] and 0 < target.d_out <= widest):
            raise ValueError(f"target {target} does not lie in a chain of sizes {size}")
    if len(spec.ranks) != len(spec.modes) - 1 or not target_map.targets:
        raise ValueError(f"{len(spec.ranks)} ranks for {len(spec.modes)} modes, {len(target_map.targets)} targets")
    alpha = float(description["alpha"])
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}")
    return spec, target_map, alpha


def read_targets(folder: Path) -> TargetMap:
    """Return which modules a saved adapter stands behind.

    Raises:
        ValueError: damaged files.
    """
    description = read_description(folder)
    try:
        return _target_map(description)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged adapter ({error!r})") from None


def _target_map(description: Mapping[str, Any]) -> TargetMap:
    return TargetMap(
        targets=tuple(Target(**target) for target in description["targets"]),
        layers=tuple(description["layers"]),
        projections=tuple(description["projections"]),
    )


def check_fit(model: nn.Module, target_map: TargetMap, folder: Path) -> None:
    """Refuse a model that has not all targets of a saved adapter.

    Raises:
        ValueError: names the module, and what it is in this model.
    """
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
