"""Whether the records that a study's runs read are still those of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metatt_scale.paths import user_path
from metatt_scale.recipe import Recipe
from metatt_scale.record_files import local_content, question_file

_GENERATED = "llm_adapters/"


class Contents:
    """Hashes of the files on this machine that recipes read; each file is hashed once for all runs."""

    def __init__(self) -> None:
        """Know none yet."""
        self._known: dict[str, str | None] = {}

    def of(self, recipe: Recipe, tasks: Sequence[str]) -> dict[str, str]:
        """Return the hash of each source of a recipe, and of the questions of tasks that are scored, by its path.

        Data sets of the hub, and files that are not on this machine, are left out.
        """
        paths = [source.path for source in (*recipe.data.train, *recipe.data.validation)]
        if recipe.evaluation.data is not None:
            folder = user_path(recipe.evaluation.data, "`evaluation.data`")
            paths += [str(question_file(folder, task.removeprefix(_GENERATED)) or "") for task in tasks]
        for path in filter(None, paths):
            if path not in self._known:
                self._known[path] = local_content(path)
        return {path: content for path in paths if path and (content := self._known[path]) is not None}


def changed_files(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the paths whose content is known of both times, and not the same."""
    return [path for path, content in then.items() if now.get(path, content) != content]
