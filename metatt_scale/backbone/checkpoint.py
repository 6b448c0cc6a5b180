"""Safetensors files read tensor by tensor, so that no process ever holds a whole model.

Files are mapped into memory, not read into it: a tensor costs nothing until it is copied to its place, and its pages
are shared by all processes of a node.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from metatt_scale.backbone.source import Source
from metatt_scale.json_files import read_json
from metatt_scale.recipe import BackboneRecipe
from metatt_scale.run_files import IndexForm

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Unfit(Exception):
    """A model that is there but is not what training needs; the text says what to do."""


class NotByLayers(Exception):
    """A model that transformers can load, but only the whole of it at once."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause
        self.remedy = remedy


def fetch(recipe: BackboneRecipe, source: Source) -> Path:
    """Return the folder of a model's safetensors files; of a hub id it is downloaded once per node.

    The first process of a node that comes here downloads, the others wait and then find everything in the cache.

    Raises:
        OSError: the hub cannot be reached or does not have it.
        NotByLayers: the hub has no safetensors under their usual names.
    """
    if source.kind == "folder":
        return Path(source.location)
    with _one_at_a_time(source):
        found = _download(recipe, source, ["*.json", _SINGLE, "model-*.safetensors"])
        if not (found / _SINGLE).is_file() and not (found / _INDEX).is_file():
            raise NotByLayers(f"the hub has no {_SINGLE} of it", "give a model that has one")
        absent = [file for file in _files_of(found) if not (found / file).is_file()]  # under names of their own
        return _download(recipe, source, absent) if absent else found


def _download(recipe: BackboneRecipe, source: Source, patterns: list[str]) -> Path:
    found = huggingface_hub.snapshot_download(source.location, revision=recipe.revision, allow_patterns=patterns)
    return Path(found)


@contextlib.contextmanager
def _one_at_a_time(source: Source) -> Iterator[None]:
    """Let one process of this node at a time into a `with` block; where the cache cannot be written, all of them."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that somebody else has filled: there is nothing to download
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache / f".{source.location.replace('/', '--')}.metatt_scale.lock"))
        yield


class Checkpoint:
    """The tensors of a folder of safetensors files under the names they have in a model."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Look up every name in the headers of the files; nothing is read yet.

        Raises:
            OSError: no safetensors file.
            NotByLayers: weights that transformers has to convert, or tied ones with different values.
        """
        self._files: dict[str, Any] = {}
        self._aliases = tied_names(model)
        self.absent: set[str] = set()
        """Names the model needs and the files lack, or have in another shape."""
        state = model.state_dict()
        self._places = self._look_up(folder, model, state)
        for name, (file, key) in list(self._places.items()):
            if self._files[file].get_slice(key).get_shape() != list(state[name].shape):
                self.absent.add(name)
                del self._places[name]
        self._check_ties(state)
        ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
        for name in state:
            if self._stored(name) is None and not any(pattern.search(name) for pattern in ignored):
                self.absent.add(name)

    def _look_up(self, folder: Path, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        prefix, places = model.base_model_prefix, {}
        for file, keys in _files_of(folder).items():
            self._files[file] = safe_open(folder / file, framework="pt")
            for key in keys or self._files[file].keys():
                name, conversion = rename_source_key(key, renamings, converters, prefix, state)
                if name not in state and key in state:
                    name, conversion = rename_source_key(key, [], [], prefix, state)
                if conversion is not None and name in state:
                    raise NotByLayers(
                        f"its files store {key} in an older form that must be converted as a whole",
                        "load it once with transformers and write it by "
                        "save_pretrained(FOLDER, save_original_format=False)",
                    )
                if name in state:  # what the model has no place for is left out, as transformers does
                    places[name] = (file, key)
        return places

    def _check_ties(self, state: dict[str, Tensor]) -> None:
        for name, aliases in self._aliases.items():
            stored = [alias for alias in aliases if alias in self._places] if name == aliases[0] else []
            for one, other in combinations(stored, 2):
                if not torch.equal(self._tensor(one), self._tensor(other)):
                    raise NotByLayers(
                        f"config.json ties {one} and {other}, but the files have different values for them",
                        "set tie_word_embeddings to false in config.json",
                    )

    def _tensor(self, name: str) -> Tensor:
        file, key = self._places[name]
        return self._files[file].get_tensor(key)

    def _stored(self, name: str) -> str | None:
        """Return the name under which the files have a tensor: its own, or one tied to it."""
        return next((alias for alias in self._aliases.get(name, (name,)) if alias in self._places), None)

    def read(self, name: str) -> Tensor | None:
        """Return the tensor of this name, or of one tied to it, mapped from its file; None where there is none."""
        stored = self._stored(name)
        return None if stored is None else self._tensor(stored)


def tied_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return, for every parameter that a model has under several names, all of them under each."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _files_of(folder: Path) -> dict[str, list[str] | None]:
    """Return the safetensors files of a folder, each with the keys wanted from it (None: all)."""
    if (folder / _SINGLE).is_file():
        return {_SINGLE: None}
    if not (folder / _INDEX).is_file():
        raise OSError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    found: dict[str, list[str] | None] = {}
    for key, file in read_json(folder / _INDEX, IndexForm, "fetch the model again")["weight_map"].items():
        if Path(file).name != file:  # a stranger's index may not lead out of its folder
            raise Unfit(f"{_INDEX} names the file {file!r}, which is not in the folder; fetch the model again")
        wanted = found.setdefault(file, [])
        assert wanted is not None
        wanted.append(key)
    return found
