"""Defaults of recipes stay as they are, or results of studies would change their meaning without a word."""

import json
from pathlib import Path

from pydantic_core import to_jsonable_python

import metatt_scale.recipe  # noqa: F401, which defines all sections
from metatt_scale.recipe.section import Section

FILE = Path(__file__).with_name("defaults.json")


def defaults() -> dict:
    """All of them, by section and key."""
    kinds, found = [Section], {}
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        for name, field in kind.model_fields.items():
            if not field.is_required():
                default = field.get_default(call_default_factory=True)
                found[f"{kind.__name__}.{name}"] = to_jsonable_python(default)
    return found


def test_no_default_has_changed():
    """A run's digest leaves defaults out: what was made with an old one would count as made with the new one.

    Where one has to change: give the old value to the recipes of the studies, or the studies new names. After
    that, and where keys are new: `python -m tests.unit.test_defaults`.
    """
    pinned, now = json.loads(FILE.read_text()), defaults()
    assert {key: now.get(key, "gone") for key in pinned} == pinned
    assert now.keys() == pinned.keys()


if __name__ == "__main__":
    FILE.write_text(json.dumps(defaults(), indent=2, sort_keys=True) + "\n")
