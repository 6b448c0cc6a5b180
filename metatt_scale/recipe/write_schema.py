"""`python -m metatt_scale.recipe.write_schema`: write recipes/recipe.schema.json, by which editors check recipes."""

from __future__ import annotations

import json
from pathlib import Path

from metatt_scale.recipe.schema import Recipe

SCHEMA_FILE = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"


def schema_text() -> str:
    """Return the JSON schema of a recipe as the file holds it."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**dialect, **Recipe.model_json_schema()}, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {SCHEMA_FILE}")
