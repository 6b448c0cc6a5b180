"""What tells one backbone's weights from another's: a hash of all bytes of the files that decide them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from metatt_scale.backbone.source import Source, resolve
from metatt_scale.hashes import bytes_to_hash, cached_sha256
from metatt_scale.recipe import BackboneRecipe

Tell = Callable[[str], None]
"""Shows a message to the user."""

_LARGE_BYTES = 1 << 30
_DECIDING = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
"""Files of a folder that decide what the model computes: sizes, weights, which file has which, and its own code."""


def identity(recipe: BackboneRecipe, tell: Tell = lambda _: None) -> str:
    """Return what identifies the weights behind `backbone.path`, wherever they lie.

    A hub id stands for itself with its revision. Of local files all bytes are hashed, which later calls and later
    processes know from a cache as long as no file changes (`metatt_scale.hashes`).

    Args:
        recipe: the backbone.
        tell: is told when more than a GiB is to be read.

    Raises:
        ValueError: nothing is there.
        OSError: a file cannot be read.
    """
    source = resolve(recipe.path)
    if source.kind == "hub":
        return f"{source.location}@{recipe.revision}"
    files = _files(source)
    unread = sum(map(bytes_to_hash, files))
    if unread >= _LARGE_BYTES:
        tell(
            f"hashing the {unread / 1e9:.1f} GB of {source.location}, by which this model is told from others; done "
            "once, as long as the files stay as they are"
        )
    digest = hashlib.sha256()
    for path in files:
        # A folder's index says by their names which file has which tensor; a single file may be called anything.
        name = path.name if source.kind == "folder" else ""
        digest.update(f"{name} {cached_sha256(path)}\n".encode())
    return f"{source.kind}-sha256 {digest.hexdigest()}"


def check_unchanged(recipe: BackboneRecipe, known: str) -> None:
    """Refuse weights whose files were changed while they were loaded.

    Raises:
        ValueError: the identity from before is not that of now.
    """
    if identity(recipe) != known:
        raise ValueError(
            f"backbone.path {recipe.path!r}: its files changed while they were loaded; start again when nothing "
            "writes to them"
        )


def is_other(recipe: BackboneRecipe, known: str) -> bool:
    """Return whether the weights are surely not those of an identity; a hub id says nothing about files on disk."""
    now = identity_by_ends(recipe) if _kind(known) in ("folder", "gguf", "random") else identity(recipe)
    return _kind(now) == _kind(known) and now != known


def identity_by_ends(recipe: BackboneRecipe) -> str:
    """Return the identity that earlier versions wrote: of sizes, and of the first and last MiB of each file.

    It is only compared with what they wrote; weights may differ where it is the same.
    """
    source = resolve(recipe.path)
    if source.kind == "hub":
        return f"{source.location}@{recipe.revision}"
    digest = hashlib.sha256()
    for path in _files(source, ("config.json", "*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return f"{source.kind} {digest.hexdigest()}"


def _kind(of: str) -> str:
    return of.partition(" ")[0] if " " in of else "hub"


def _files(source: Source, deciding: tuple[str, ...] = _DECIDING) -> list[Path]:
    folder = Path(source.location)
    if source.gguf_file:
        return [folder / source.gguf_file]
    if source.kind == "random":
        return [folder / "config.json" if folder.is_dir() else folder]
    return [path for pattern in deciding for path in sorted(folder.glob(pattern)) if path.is_file()]
