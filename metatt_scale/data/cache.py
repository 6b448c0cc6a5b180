"""Tokenise a source once: a folder of flat arrays, named after everything that decides its content."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metatt_scale.data.records import Fields, read_records
from metatt_scale.data.sentences import tokenize_sentences
from metatt_scale.data.sources import OpenSource, open_source
from metatt_scale.data.tokens import Progress, TokenTable, tokenize_records
from metatt_scale.files import cache_folder, new_folder, sha256, write_json
from metatt_scale.json_files import read_json
from metatt_scale.paths import user_path
from metatt_scale.recipe import DataRecipe, DataSource
from metatt_scale.record_files import content_of
from metatt_scale.run_files import EntryForm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)
_VERSION = 2  # of the files and of the rules that fill them: raise it when either changes
_DTYPES = {
    "tokens": ("I32", np.int32),
    "flags": ("U8", np.uint8),
    "offsets": ("I64", np.int64),
    "segments": ("U8", np.uint8),
    "classes": ("I32", np.int32),
    "values": ("F32", np.float32),
}


def tokenize_source(
    source: DataSource,
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress | None = None,
    classes: int | None = None,
) -> tuple[TokenTable, dict[str, int], str]:
    """Return the token table of one source, from the cache where it is there, its counts, and a hash of its content.

    Counts: `records` (usable), `skipped`, and those of `tokenize_records`. Processes that start together tokenise
    once: the first one works, the others wait at a lock file. `classes` is their number in the sentences format, 1
    where labels are numbers.

    Raises:
        ValueError: the source cannot be read, or nothing in it can be trained on.
    """
    opened = open_source(source)
    fields = None
    if recipe.format == "sentences":
        assert classes is not None, "the recipe has a classifier then"
        fields = Fields(recipe.text_fields, recipe.label_field, classes)
    parts = _key_parts(opened, source, recipe, tokenizer, fields)
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    root = user_path(recipe.cache_dir, "data.cache_dir") if recipe.cache_dir else cache_folder() / "tokens"
    folder = root / key
    found = _read_entry(folder)
    if found is not None:
        return *found, content_of(opened.identity)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            found = _read_entry(folder)  # another process may have filled it while this one waited
            if found is None:
                if folder.exists():
                    logger.warning("the token cache %s is damaged and is made again", folder)
                table, counts = _tokenize(opened, source, recipe, tokenizer, progress, fields)
                _write_entry(folder, table, {"key": parts, "counts": counts})
                found = _read_entry(folder)
    except OSError as error:
        raise ValueError(
            f"the token cache {root} cannot be written ({error.strerror or error}); "
            "set `data.cache_dir` to a folder with room that you may write to"
        ) from error
    assert found is not None, f"{folder} was just written and cannot be read"
    return *found, content_of(opened.identity)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in a tokenizer that decides ids.

    Truncation and padding are left out: they are settings of the last call, and this package does both itself.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__  # a slow tokenizer, refused by name when it comes to tokenising
    model = json.loads(backend.to_str())
    model.pop("truncation", None)
    model.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [model, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _key_parts(
    opened: OpenSource,
    source: DataSource,
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    fields: Fields | None,
) -> dict[str, Any]:
    is_hub = opened.identity[0] == "hub"
    parts = {
        "version": _VERSION,
        "content": list(opened.identity),
        "limit": source.limit,
        "split": source.split if is_hub else None,
        "tokenizer": tokenizer_identity(tokenizer),
        "format": recipe.format,
        "template": recipe.template if recipe.format == "instruction" else None,
        "cutoff_length": recipe.cutoff_length,
        "train_on_inputs": recipe.train_on_inputs,
        "on_bad_record": recipe.on_bad_record,
    }
    if source.where:
        parts["where"] = source.where
    if source.limit is not None and source.draw != "first":
        parts["draw"] = source.draw
    return parts if fields is None else {**parts, "fields": fields}


def _tokenize(
    opened: OpenSource,
    source: DataSource,
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress | None,
    fields: Fields | None,
) -> tuple[TokenTable, dict[str, int]]:
    skipped: list[str] = []

    def on_bad(message: str) -> None:
        if recipe.on_bad_record == "error":
            raise ValueError(f"{message}; correct the record, or set `data.on_bad_record: skip`")
        skipped.append(message)

    records = read_records(opened, recipe.format, on_bad, source, fields)
    in_reading = len(skipped)
    if fields is not None:
        table, counts = tokenize_sentences(records, recipe, tokenizer, fields.classes, progress)
    else:
        table, counts = tokenize_records(records, recipe, tokenizer, on_bad, progress)
    usable = len(records) - (len(skipped) - in_reading)  # a chat template may refuse a few more
    if skipped:
        logger.warning("%s: %d records skipped; the first: %s", source.path, len(skipped), skipped[0])
    if not usable:
        reason = f"; the first of {len(skipped)} skipped: {skipped[0]}" if skipped else ""
        where = f" with {source.where}{_first_fields(opened)}" if source.where else ""
        raise ValueError(
            f"data source {source.path!r} holds no usable {recipe.format} record{where}{reason}; "
            "give a file that has some, or leave the source out"
        )
    if not len(table):
        raise ValueError(
            f"none of the {usable} records of {source.path!r} has an answer left after cutting at "
            f"{recipe.cutoff_length} tokens; raise `data.cutoff_length`"
        )
    if counts["dropped"]:
        logger.warning(
            "%s: %d of %d records have no answer left after cutting at %d tokens and are dropped",
            *(source.path, counts["dropped"], usable, recipe.cutoff_length),
        )
    return table, {"records": usable, "skipped": len(skipped), **counts}


def _first_fields(opened: OpenSource) -> str:
    with opened.read(lambda _: None) as values:
        first = next((value for value, _ in values if isinstance(value, dict)), None)
    return "" if first is None else f" (the fields of its first record: {', '.join(map(repr, first))})"


def _write_entry(folder: Path, table: TokenTable, meta: dict[str, Any]) -> None:
    with new_folder(folder, replace=True) as temporary:
        save_file(table.arrays(), temporary / "tokens.safetensors")
        write_json(temporary / "meta.json", {**meta, "sha256": sha256(temporary / "tokens.safetensors")})


def _read_entry(folder: Path) -> tuple[TokenTable, dict[str, int]] | None:
    """Map an entry into memory; None where it is absent, incomplete or not what was written."""
    file = folder / "tokens.safetensors"
    try:
        meta = read_json(folder / "meta.json", EntryForm, "it is made again")
        if sha256(file) != meta["sha256"]:
            return None
        table = TokenTable(**_map_arrays(file))
    except (OSError, ValueError, SafetensorError, TypeError):
        return None
    return (table, dict(meta["counts"])) if table.is_whole() else None


def _map_arrays(file: Path) -> dict[str, Any]:
    """Map the arrays of a safetensors file read-only (safetensors itself copies them into every process).

    The file is an 8-byte little-endian length, a JSON header of that length, and the arrays.
    """
    with safe_open(file, framework="np"):  # or it is none: header, sizes and places fit together from here on
        pass
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    arrays = {}
    for name in header.keys() - {"__metadata__"}:
        entry, (code, dtype) = header[name], _DTYPES.get(name, ("none", np.uint8))
        if entry["dtype"] != code:
            raise ValueError(f"{file}: {name} is {entry['dtype']}, not {code}")
        start = 8 + length + entry["data_offsets"][0]
        mapped = np.memmap(file, dtype, "r", start, tuple(entry["shape"]))
        arrays[name] = np.asarray(mapped)  # a plain view: slices of np.memmap are slow to make
    return arrays
