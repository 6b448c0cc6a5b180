"""From a YAML file and command-line overrides to a `Recipe`, or to one readable message."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from metatt_scale.json_files import show, unusable
from metatt_scale.paths import user_path
from metatt_scale.recipe.explain import explain
from metatt_scale.recipe.schema import Recipe

Schema = TypeVar("Schema", bound=BaseModel)
_MAX_BYTES = 1 << 20  # a recipe has a few hundred lines at most; whoever passes a model or a data set hears so


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names file, key, value received, rule and remedy."""


# YAML 1.2 numbers: 1e-3 is a number; 010 and 1:30 are text and not, as in YAML 1.1, the numbers 8 and 90.
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` for plain values: no tags, no aliases, no dates, no duplicate keys, YAML 1.2 numbers.

    A few aliases of aliases stand for billions of values and a tag may ask for an object; a recipe needs neither.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            problem = f"alias *{event.anchor} is not supported; write the value out"
        elif tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"tag {shown} is not supported; a recipe holds text, numbers, lists and sections"
        else:
            return super().compose_node(parent, index)
        raise yaml.MarkedYAMLError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes whatever text `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regexp in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _regexp, list("-+0123456789."))
    _Dumper.add_implicit_resolver(_tag, _regexp, list("-+0123456789."))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problem = f"key {show(key)} is not text; put it in quotes if it is meant"
            raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
        if key in mapping:
            problem = f"key `{key}` appears twice; keep one of them"
            raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 1000:  # Python reads no more than 4300 digits, and that slowly
        problem = f"a whole number of {len(node.value)} digits; give a shorter one"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    return int(node.value.replace("_", ""))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML with no tag that could build an object; `source` names it in the error message."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_message(error, source)) from None
    except RecursionError:
        raise RecipeError(f"{source}: lists or sections are nested too deeply") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `dotted.key=value` overrides and check the result.

    Raises:
        RecipeError: unreadable file, unknown key, wrong type or contradiction.
    """
    data = read_mapping(path, "recipe", "backbone")
    for override in overrides:
        _apply_override(data, override)
    changed = " with " + " ".join(map(_shortened, overrides)) if overrides else ""
    return validate(data, f"{path}{changed}")


def read_mapping(path: str | Path, kind: str, key: str) -> dict[str, Any]:
    """Return what a YAML file holds; messages call it a `kind` and name `key` as one that it may have.

    Raises:
        RecipeError: unreadable file, or no keys and values.
    """
    try:
        path = user_path(path, kind)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    data = parse_yaml(_read(path, kind), str(path))
    if not isinstance(data, dict):
        found = "empty" if data is None else _kind(data)
        raise RecipeError(f"{path}: the file is {found}; a {kind} is a mapping of keys such as `{key}:`")
    return data


def validate(data: dict[str, Any], source: str) -> Recipe:
    """Check a plain mapping against the recipe's schema; `source` names it in error messages."""
    return check(data, source, Recipe)


def check(data: dict[str, Any], source: str, schema: type[Schema]) -> Schema:
    """Check a plain mapping against a schema; `source` names it in error messages."""
    if problem := unusable(data):
        raise RecipeError(f"{source}: {problem}")
    try:
        # The JSON route lets strict mode accept YAML lists where the schema says tuple.
        return schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(explain(error, source, schema)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` gives the same recipe back."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" The folder holds: {', '.join(near)}." if near else ""
        raise RecipeError(f"{path}: no such {kind}.{hint}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; give the path of a {kind} file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _MAX_BYTES:
        raise RecipeError(f"{path}: is longer than {_MAX_BYTES >> 20} MiB, so it is not a {kind}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); a {kind} is a YAML file") from None


def _yaml_message(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{source}, line {mark.line + 1}" if mark else source
    parts = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    problem = ", ".join(part for part in parts if part) or "unreadable"
    if r"'\t'" in problem:
        problem += "; indent with spaces, not tabs"
    elif "cannot start any token" in problem:
        problem += "; put text that begins so in quotes"
    elif "mapping values are not allowed" in problem:
        problem += "; check the indentation, and put text that holds ': ' in quotes"
    return f"{where}: not valid YAML: {problem}"


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"override {_shortened(override)}: expected dotted.key=value, for example training.max_steps=100"
        )
    node = data
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            above = ".".join(keys[:depth])
            remedy = f"; give the whole list, for example '{above}=[...]'" if isinstance(child, list) else ""
            problem = f"`{above}` is {show(child)}, not a section with keys of its own{remedy}"
            raise RecipeError(f"override {_shortened(override)}: {problem}")
        node = child
    node[keys[-1]] = parse_yaml(text, f"override {_shortened(override)}")


def _shortened(override: str) -> str:
    return repr(override if len(override) < 200 else override[:197] + "...")


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")
