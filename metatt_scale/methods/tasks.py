"""How many tasks an adapter has to tell apart."""

from __future__ import annotations

from metatt_scale.recipe import Recipe


def task_count(recipe: Recipe) -> int:
    """Return the number of tasks; one where the recipe names none."""
    return len(getattr(recipe, "tasks", None) or {}) or 1
