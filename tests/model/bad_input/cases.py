"""The table of cases, and what they are made with: a recipe to train, damage to files."""

import yaml

from tests.toy import toy

CASES = {}
"""name -> (function that breaks something in a folder and returns the arguments, what the message must say)."""


def case(name, *says):
    """Register a function as a case."""

    def register(function):
        assert name not in CASES
        CASES[name] = (function, says)
        return function

    return register


def cases(make, table):
    """Register make(*row's arguments) for each row (name, arguments, says...)."""
    for name, arguments, *says in table:
        assert name not in CASES, name
        CASES[name] = (make(*arguments), tuple(says))


def train(folder, *overrides, text=None, **sections):
    """Write a recipe and return the arguments that train it."""
    file = folder / "r.yaml"
    # Its own run directory, unless the case speaks of the finished one.
    data = toy(folder, **{"output_dir": str(folder / "new"), **sections})
    file.write_text(yaml.safe_dump(data) if text is None else text)
    return ["train", str(file), *overrides]


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name, share=0.5):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def put(name, content):
    return lambda folder: (folder / name).write_text(content)
