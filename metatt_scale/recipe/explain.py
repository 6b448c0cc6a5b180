"""What is wrong with a file of keys, in words: from pydantic's problems to one readable message."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from metatt_scale.json_files import show

_MAX_PROBLEMS = 10


def explain(error: ValidationError, source: str, schema: type[BaseModel]) -> str:
    """Return pydantic's problems as one message: a line per key with value received, rule, and what the key means."""
    # A union (a whole number or a list) reports a problem per member: join them to one line per key, and where a
    # list was given speak of its wrong entry only.
    problems: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_keys(problem), []).append(problem)
    lines = [
        _explain(keys, same_key, schema)
        for keys, same_key in problems.items()
        if not any(len(other) > len(keys) and other[: len(keys)] == keys for other in problems)
    ]
    if len(lines) > _MAX_PROBLEMS:
        lines[_MAX_PROBLEMS:] = [f"and {len(lines) - _MAX_PROBLEMS} more problems"]
    return f"{source}: " + "\n".join(lines)


def _keys(problem: Any) -> tuple[str, ...]:
    keys = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":  # the last part is what the user wrote, whatever it looks like
        return (*(key for key in keys[:-1] if not _is_union_tag(key)), keys[-1])
    return tuple(key for key in keys if not _is_union_tag(key))


def _is_union_tag(part: str) -> bool:
    return part in ("int", "str", "float", "bool", "[key]") or part.startswith(("literal[", "tuple[", "constrained-"))


def _explain(keys: tuple[str, ...], problems: list[Any], schema: type[BaseModel]) -> str:
    dotted, kind, received = ".".join(keys), problems[0]["type"], problems[0].get("input")
    if kind == "extra_forbidden":
        return f"unknown key `{dotted}` (value {show(received)}); {_nearest_key(keys, schema)}"
    if kind == "missing" and not keys[-1].isdigit():
        return f"key `{dotted}` is missing ({_description(keys, schema)})"
    if kind == "value_error":
        where = f"in `{dotted}`: " if keys else ""
        return where + problems[0]["msg"].removeprefix("Value error, ")
    if kind == "missing":  # an entry of a list of fixed length
        return f"`{'.'.join(keys[:-1])}` has too few entries ({_description(keys, schema)})"
    rule = " or ".join(dict.fromkeys(_rule(problem) for problem in problems)).replace(" or true or", ", true or")
    rule = rule if rule.startswith("it must") else f"give {rule}"
    return f"`{dotted}` is {show(received)}; {rule} ({_description(keys, schema)})"


def _rule(problem: Any) -> str:
    bounds = problem.get("ctx", {})
    match problem["type"]:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type":
            return "a number"
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text"
        case "tuple_type":
            return "a list"
        case "model_type" | "dict_type":
            return "keys and values"
        case "literal_error":
            return bounds["expected"]
        case "greater_than":
            return f"it must be greater than {bounds['gt']:g}"
        case "greater_than_equal":
            return f"it must be at least {bounds['ge']:g}"
        case "less_than":
            return f"it must be less than {bounds['lt']:g}"
        case "string_too_short" | "too_short":
            return "it must not be empty"
        case "string_pattern_mismatch":
            return f"it must match {bounds['pattern']}"
        case "too_long":
            return f"it must have {bounds['max_length']} entries"
        case _:
            return problem["msg"].replace("Input should", "it must")


def _nearest_key(keys: tuple[str, ...], schema: type[BaseModel]) -> str:
    known = _known_keys(keys[:-1], schema)
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{'.'.join((*keys[:-1], near[0]))}`?"
    sections = schema.model_fields
    elsewhere = [f"{section}.{key}" for section in sections for key in _known_keys((section,), schema)]
    elsewhere = [dotted for dotted in [*sections, *elsewhere] if dotted.split(".")[-1] == keys[-1]]
    return f"did you mean `{elsewhere[0]}`?" if elsewhere else "known keys: " + ", ".join(known)


def _section(keys: tuple[str, ...], schema: type[BaseModel]) -> type[BaseModel] | None:
    section = schema
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


def _known_keys(keys: tuple[str, ...], schema: type[BaseModel]) -> list[str]:
    section = _section(keys, schema)
    return list(section.model_fields) if section else []


def _description(keys: tuple[str, ...], schema: type[BaseModel]) -> str:
    while keys and (keys[-1].isdigit() or _section(keys[:-1], schema) is None):
        keys = keys[:-1]  # an entry is described by its list, a name that the user gave by the section it stands in
    section = _section(keys[:-1], schema)
    field = section.model_fields.get(keys[-1]) if section and keys else None
    itself = _section(keys, schema)
    text = (field.description if field else None) or (itself.__doc__ if itself else None)
    return " ".join((text or "see recipes/recipe.schema.json").split())
