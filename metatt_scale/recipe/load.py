"""From a YAML file and command-line overrides to a `Recipe`, or to one readable message."""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from metatt_scale.recipe.schema import Recipe


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names file, key, value received, rule and remedy."""


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load` with YAML 1.2 numbers (1e-3 is a number) and duplicate keys refused."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is not text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} appears twice; keep one of them", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML with no tag that could build an object; `source` names it in the error message."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise RecipeError(f"{where}: not valid YAML: {problem}") from None


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read the recipe at `path`, apply `dotted.key=value` overrides and check the result.

    Raises:
        RecipeError: unreadable file, unknown key, wrong type or contradiction.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" The folder holds: {', '.join(near)}." if near else ""
        raise RecipeError(f"{path}: no such recipe.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"{path}: the file is {kind}; a recipe is a mapping of keys such as `backbone:`")
    for override in overrides:
        _apply_override(data, override)
    return validate(data, str(path))


def validate(data: dict[str, Any], source: str) -> Recipe:
    """Check a plain mapping against the schema; `source` names it in error messages."""
    _refuse_nonfinite(data, source, ())
    try:
        # The JSON route lets strict mode accept YAML lists where the schema says tuple.
        return Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(_message(error, source)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` gives the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"override {override!r}: expected dotted.key=value, for example training.max_steps=100"
        )
    node = data
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise RecipeError(
                f"override {override!r}: `{key}` is {child!r}, not a section with keys of its own"
            )
        node = child
    node[keys[-1]] = parse_yaml(text, f"override {override!r}")


def _refuse_nonfinite(value: Any, source: str, keys: tuple[str, ...]) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _refuse_nonfinite(child, source, (*keys, str(key)))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _refuse_nonfinite(child, source, (*keys, str(i)))
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{source}: `{'.'.join(keys)}` is {value}; numbers must be finite")


def _message(error: ValidationError, source: str) -> str:
    problems = error.errors(include_url=False, include_context=False)
    # A union of section types or of literal and number reports one problem per member: keep one line per key.
    lines: dict[str, str] = {}
    for problem in problems:
        keys = [str(part) for part in problem["loc"] if not _is_union_tag(str(part))]
        dotted = ".".join(keys) or "the recipe"
        lines.setdefault(
            dotted,
            _explain(
                dotted,
                keys,
                problem,
                [p["msg"] for p in problems if p["loc"][: len(keys)] == problem["loc"][: len(keys)]],
            ),
        )
    return f"{source}: " + "\n".join(lines.values())


def _is_union_tag(part: str) -> bool:
    return part in ("int", "str", "float") or part.startswith(("literal[", "tuple[", "constrained-"))


def _explain(dotted: str, keys: list[str], problem: Any, rules: list[str]) -> str:
    kind, received = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.6)
        remedy = f"did you mean `{near[0]}`?" if near else "known keys: " + ", ".join(known)
        return f"unknown key `{dotted}` (value {received!r}); {remedy}"
    if kind == "missing":
        return f"key `{dotted}` is missing; {_description(keys)}"
    if kind == "value_error":
        return f"in `{dotted}`: " + problem["msg"].removeprefix("Value error, ")
    shown = repr(received)
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    rule = " or ".join(dict.fromkeys(r[0].lower() + r[1:] for r in rules))
    return f"`{dotted}` is {shown}; {rule} ({_description(keys)})"


def _section(keys: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Recipe
    for key in keys:
        if key.isdigit():
            continue
        field = section.model_fields.get(key)
        if field is None:
            return None
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return None
        section = models[0]
    return section


def _known_keys(keys: list[str]) -> list[str]:
    section = _section(keys)
    return list(section.model_fields) if section else []


def _description(keys: list[str]) -> str:
    section = _section(keys[:-1])
    field = section.model_fields.get(keys[-1]) if section and keys else None
    text = (field.description if field else None) or "see recipes/recipe.schema.json"
    return " ".join(text.split())
