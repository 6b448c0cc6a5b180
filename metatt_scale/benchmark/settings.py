"""What a person can choose about a benchmark, besides the recipe; nothing heavy is imported here."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any

from metatt_scale.paths import path_argument
from metatt_scale.recipe import Recipe

TABLES = {
    "steps": ("examples", "length", "ranks"),
    "end_to_end": ("block_steps",),
    "sweep": ("ranks",),
    "wire": ("ranks",),
    "scaling": ("examples", "length"),
    "generation": ("examples", "length", "new_tokens", "ranks"),
}
"""Every table with the settings it takes; all of them take repeats."""

_RANGES = {
    "examples": (1, 2**16),
    "length": (2, 2**24),
    "repeats": (1, 10**6),
    "block_steps": (1, 10**6),
    "new_tokens": (1, 2**24),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of a benchmark."""

    examples: int = 8
    """Examples of a step; prompts of `generation`, continued together."""
    length: int = 128
    """Tokens of each example."""
    repeats: int = 7
    """Rounds that count."""
    block_steps: int = 10
    """Optimizer steps of each trainer's turn in `end_to_end`."""
    new_tokens: int = 32
    """Tokens by which `generation` continues each prompt."""
    ranks: tuple[int, ...] = (8, 16, 64)
    """TT-ranks, each of all bonds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `benchmark` takes besides a recipe and its overrides."""
    default = Settings()
    parser.add_argument("--table", choices=tuple(TABLES), default="steps", help="what to measure (steps)")

    def add(name: str, meaning: str, **kind: Any) -> None:
        """Add an option; its help names the default, and the tables that take it where not all do."""
        value = getattr(default, name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        tables = [table for table, takes in TABLES.items() if name in takes]
        where = f"; for {', '.join(tables)}" if tables else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{meaning} ({shown}){where}", **kind)

    add("examples", "examples per step, or prompts", type=int)
    add("length", "tokens per example", type=int)
    add("repeats", "rounds that count", type=int)
    add("block_steps", "steps per turn", type=int, metavar="N")
    add("new_tokens", "tokens to generate", type=int, metavar="N")
    add("ranks", "TT-ranks", metavar="R,R,...")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where it is measured (the recipe's `device`)")
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="where the raw numbers go (benchmark_TABLE_TIME.json)"
    )


def settings_of(table: str, settings: Settings, recipe: Recipe, **more: Any) -> dict[str, Any]:
    """Return what a table was measured with, for its JSON: the settings it takes, the recipe, and what is given."""
    taken = {name: getattr(settings, name) for name in (*TABLES[table], "repeats")}
    return {**taken, "recipe": recipe.model_dump(mode="json"), **more}


def read_settings(options: Namespace) -> Settings:
    """Return the settings of a command line.

    Raises:
        ValueError: a number out of range, no list of ranks, or a setting that the chosen table does not take.
    """
    takes = (*TABLES[options.table], "repeats")
    given: dict[str, Any] = {}
    for field in fields(Settings):
        value = getattr(options, field.name)
        if value is None:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if field.name not in takes:
            known = ", ".join(f"--{name.replace('_', '-')}" for name in takes)
            raise ValueError(
                f"{flag} is {value}, but --table {options.table} takes {known} only; leave {flag} out, or choose "
                "another table"
            )
        given[field.name] = _ranks(value) if field.name == "ranks" else _within(flag, value, *_RANGES[field.name])
    return Settings(**given)


def _within(flag: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise ValueError(f"{flag} is {value}; it must be at least {least} and at most {most:,}")
    return value


def _ranks(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    ranks = [int(part) for part in parts if part.isdecimal() and 1 <= int(part) <= 8192]
    if len(ranks) != len(parts) or len(set(ranks)) != len(ranks):
        raise ValueError(f"--ranks is {text!r}; give different numbers from 1 to 8192, for example 8,16,64")
    return tuple(ranks)
