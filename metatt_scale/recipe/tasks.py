"""Rules that join `tasks` with the other sections."""

from __future__ import annotations

from collections.abc import Mapping

from metatt_scale.recipe.records import ClassifierRecipe, DataRecipe, TaskRecipe

Tasks = Mapping[str, TaskRecipe]


def check_tasks(tasks: Tasks, data: DataRecipe, classifier: ClassifierRecipe | None) -> None:
    """Refuse tasks without records, records without a task, and labels in the wrong place or in none.

    Raises:
        ValueError: with the rule and the remedy.
    """
    _check_sources(tasks, data)
    if classifier is None:
        if named := next((name for name, task in tasks.items() if task.labels or task.metric), None):
            raise ValueError(
                f"task {named!r} has labels, but there is no `classifier`; add `classifier: {{}}`, or leave them out"
            )
        return
    if not tasks:
        if classifier.labels is None:
            raise ValueError("`classifier.labels` is missing; say how many classes the records have (1: numbers)")
        data.of_task(TaskRecipe())
        return
    if classifier.labels is not None or classifier.metric is not None:
        key = "labels" if classifier.labels is not None else "metric"
        raise ValueError(
            f"`classifier.{key}` is {getattr(classifier, key)!r}, but there are `tasks`; give each task its own there"
        )
    for name, task in tasks.items():
        if task.labels is None:
            raise ValueError(f"`tasks.{name}.labels` is missing; say how many classes it has (1: numbers)")
        try:
            data.of_task(task)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from None


def _check_sources(tasks: Tasks, data: DataRecipe) -> None:
    sources = [
        (f"data.{part}[{i}]", s) for part in ("train", "validation") for i, s in enumerate(getattr(data, part))
    ]
    known = ", ".join(tasks) or "none"
    for place, source in sources:
        if (source.task is None) == bool(tasks):
            given = "has no `task`" if source.task is None else f"is of task {source.task!r}"
            raise ValueError(f"`{place}` {given}, but `tasks` names {known}; give all sources a task, or none")
        if source.task is not None and source.task not in tasks:
            raise ValueError(
                f"`{place}` is of task {source.task!r}, which `tasks` does not name; choose one of {known}"
            )
    for part in ("train", "validation"):
        there = {source.task for source in getattr(data, part)}
        if there and (missing := [name for name in tasks if name not in there]):
            raise ValueError(
                f"task {missing[0]!r} has no source in `data.{part}`; give it one, or leave the task out"
            )
