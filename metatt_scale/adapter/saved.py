"""The adapter on disk: `metatt.json` (what it is), `metatt.safetensors` (its tensors, of a chain the cores)
and, of a classifier whose head is frozen, `head.safetensors` (the head it was trained under).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter.base import HEAD_PREFIX, Adapter
from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.inject import compute_dtype
from metatt_scale.adapter.leaves import Leaves
from metatt_scale.adapter.modes import KINDS, ChainSpec, check_order
from metatt_scale.adapter.targets import Target, TargetMap, is_linear, widths
from metatt_scale.files import save_tensors, sha256, write_json
from metatt_scale.heads import in_head
from metatt_scale.json_files import read_json
from metatt_scale.paths import user_path
from metatt_scale.run_files import AdapterForm
from metatt_scale.tensor_files import TensorForm, difference, forms_of, read_tensors

CONFIG, WEIGHTS, HEAD = "metatt.json", "metatt.safetensors", "head.safetensors"
_FORMAT = 1
_BACKUP = "take the adapter from a backup"


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
        ValueError: not an adapter folder, unknown format, or damaged files.
    """
    try:
        description = read_json(folder / CONFIG, AdapterForm, f"{_BACKUP}, or open it with the version that wrote it")
    except FileNotFoundError:
        raise ValueError(f"{folder}: not an adapter folder, it has no {CONFIG}") from None
    wanted = {WEIGHTS: description["weights_sha256"]}
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
    """Read a saved chain without a backbone: enough for its exact LoRA form.

    Raises:
        ValueError: damaged files.
    """
    description = read_description(folder)
    try:
        spec, target_map = _parse(description)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: damaged adapter ({error}); {_BACKUP}") from None
    values = _read(folder / WEIGHTS)
    cores = {name: value for name, value in values.items() if not name.startswith(HEAD_PREFIX)}
    wanted = {f"core_{k}": TensorForm(shape, torch.float32) for k, shape in enumerate(spec.shapes)}
    if problem := difference(forms_of(cores), wanted):
        raise ValueError(f"{folder / WEIGHTS}: {problem} by {CONFIG}; {_BACKUP}")
    ordered = [cores[f"core_{k}"] for k in range(len(spec.modes))]
    return ChainAdapter(spec, ordered, description["alpha"], target_map, torch.float32)


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
        ValueError: a tensor is missing, unknown, or of another shape or type.
    """
    values = _read(folder / WEIGHTS)
    if problem := difference(forms_of(values), forms_of(adapter.result())):
        raise ValueError(
            f"{folder / WEIGHTS}: {problem} by the recipe in {CONFIG}; the files do not belong together, {_BACKUP}"
        )
    adapter.set_values(values)


def trained_head(folder: Path) -> Leaves | None:
    """Return the head that a saved adapter has trained; None where it has none.

    Raises:
        ValueError: damaged files.
    """
    head = {
        name.removeprefix(HEAD_PREFIX): value
        for name, value in _read(folder / WEIGHTS).items()
        if name.startswith(HEAD_PREFIX)
    }
    return Leaves(head) if head else None


def read_head(folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a classifier's frozen head by name; None where the adapter has none.

    Raises:
        ValueError: damaged files.
    """
    return _read(folder / HEAD) if "head_sha256" in read_description(folder) else None


def put_head(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the frozen head that a saved adapter was trained under, if it was.

    Raises:
        ValueError: a damaged file, or a model without such a head.
    """
    head = read_head(folder)
    if head is not None:
        set_head(model, head, f"{folder / HEAD}")


def set_head(model: PreTrainedModel, head: Mapping[str, Tensor], where: str) -> None:
    """Give a model the values of a head, by name; `where` they stand is for the error. No other weight is replaced.

    Raises:
        ValueError: a model with another head.
    """
    parameters = dict(model.named_parameters())
    found = {name: tuple(value.shape) for name, value in head.items()}
    wanted = {name: tuple(parameters[name].shape) for name in parameters if in_head(model, name)}
    if found != wanted:
        name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{where}: holds {name} of shape {found.get(name, 'nothing')}, but the head of "
            f"{type(model).__name__} has {wanted.get(name, 'none of that name')}; load the backbone with "
            "the recipe's `classifier`"
        )
    if other := next((name for name, value in head.items() if not value.is_floating_point()), None):
        raise ValueError(f"{where}: {other} is {TensorForm.of(head[other])}; a head has floating numbers, {_BACKUP}")
    with torch.no_grad():
        for name, value in head.items():
            parameters[name].copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; damaged adapter, {_BACKUP}") from None


def _parse(description: Mapping[str, Any]) -> tuple[ChainSpec, TargetMap]:
    """Return what `metatt.json`, whose keys have the right types, says of a chain.

    Raises:
        ValueError: it is none.
    """
    found: list[list[Any]] = [description.get(key) or [] for key in ("modes", "sizes", "ranks")]
    modes, sizes, ranks = map(tuple, found)
    kind = next((kind for kind, known in KINDS.items() if sorted(modes) == sorted(known)), None)
    if kind is None:
        raise ValueError(f"modes {modes} are those of no chain")
    check_order(modes, kind)
    target_map = _target_map(description)
    if len(sizes) != len(modes) or len(ranks) != len(modes) - 1 or not target_map.targets:
        raise ValueError(
            f"{len(sizes)} sizes and {len(ranks)} ranks for {len(modes)} modes, {len(target_map.targets)} targets"
        )
    diagonal, projections = description.get("diagonal", False), len(target_map.projections)
    if diagonal and len(set(ranks)) > 1:
        raise ValueError(f"ranks {ranks} of diagonal slices, which have one rank")
    spec = ChainSpec(modes=modes, sizes=sizes, ranks=ranks, diagonal=diagonal, projections=projections)
    size: dict[str, int] = dict(zip(modes, sizes, strict=True))
    layers = size["site"] // max(1, projections) if "site" in size else size["layer"]
    if projections != (size["site"] // max(1, layers) if "site" in size else size["projection"]):
        raise ValueError(f"{projections} projections in a chain of sizes {size}")
    widest = size["output"] * size.get("head", 1)
    for target in target_map.targets:
        inside = target.layer < layers and target.projection < projections
        if not (inside and target.d_in <= size["input"] and target.d_out <= widest):
            raise ValueError(f"target {target} does not lie in a chain of sizes {size}")
    return spec, target_map


def read_targets(folder: Path) -> TargetMap:
    """Return which modules a saved adapter stands behind.

    Raises:
        ValueError: damaged files.
    """
    return _target_map(read_description(folder))


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
