"""Tasks of the harness: their definitions, and their questions from local files.

A definition is looked up as `NAME.yaml` in a folder of task files in the harness's format, then among the
harness's own tasks. With a data folder its questions come from `NAME.jsonl` or `NAME.jsonl.gz` there, and nothing
else of the definition changes; without one the harness fetches them from the hub.
"""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Any

import metatt_scale
from metatt_scale.data.records import Record
from metatt_scale.data.sources import changed_while_read, open_source
from metatt_scale.files import sha256
from metatt_scale.paths import user_path
from metatt_scale.recipe import DataSource
from metatt_scale.record_files import question_file
from metatt_scale.strict_json import is_unicode

TASKS_FOLDER = Path(metatt_scale.__file__).resolve().parents[1] / "recipes" / "tasks"
"""Task files shipped with a checkout. They spare the harness's 10 s search; without them it finds the same tasks."""


def data_file(folder: str | Path, task: str) -> Path:
    """Return `TASK.jsonl` or `TASK.jsonl.gz` in `folder`.

    Raises:
        ValueError: there is neither, or no such folder.
    """
    folder = user_path(folder, "`evaluation.data`")
    if (file := question_file(folder, task)) is not None:
        return file
    if not folder.is_dir():
        raise ValueError(f"`evaluation.data` is {str(folder)!r}; there is no such folder")
    there = sorted({path.name.split(".jsonl")[0] for path in folder.glob("*.jsonl*")})
    raise ValueError(
        f"task {task!r} has no data: {folder} holds neither {task}.jsonl nor {task}.jsonl.gz. "
        f"There are files for: {', '.join(there) or 'no task'}"
    )


Records = list[tuple[Record, str]]
"""Each with its place, as "file:line"."""


def read_records(path: Path, known: str | None = None) -> Records:
    """Return the JSON objects of a file, one a line, each with its place; all must have the fields of the first.

    Args:
        path: the file.
        known: its hash (`data_key`), under which the scores are kept; any when absent.

    Raises:
        ValueError: naming file and line: not JSON, not an object, a field missing, half a character; or an empty
            file, or one that has changed.
    """
    rule = "each line must be one JSON object with the task's fields"

    def refuse(problem: str) -> None:
        raise ValueError(f"{problem}; {rule}")

    found: Records = []
    opened = open_source(DataSource(path=str(path)))
    if known is not None and known not in opened.identity:
        raise changed_while_read(path)
    with opened.read(refuse) as values:
        for value, place in values:
            if not isinstance(value, dict):
                refuse(f"{place}: a {type(value).__name__}")
            if not is_unicode(value):
                refuse(f"{place}: an unpaired surrogate, which is not valid Unicode")
            missing = found[0][0].keys() - value.keys() if found else set()
            if missing:
                refuse(f"{place}: no field `{min(missing)}`, which the first record has")
            found.append((value, place))
    if not found:
        refuse(f"{path}: no questions")
    return found


def definition_key(task: str) -> str:
    """Return what names a task's definition: the SHA-256 of its task file, or "lm_eval" for the harness's own."""
    path = TASKS_FOLDER / f"{task}.yaml"
    return sha256(path) if path.is_file() else "lm_eval"


def data_key(task: str, folder: str | None) -> str:
    """Return what names a task's questions: the SHA-256 of its data file, or "hub"."""
    return "hub" if folder is None else sha256(data_file(folder, task))


def build_task(task: str, data: str | None, limit: int | None, known: str | None = None) -> tuple[Any, str]:
    """Return the harness's task object, scoring both `acc` and `acc_norm`, and the metric it lists itself.

    Args:
        task: name of a task file or of a task of the harness.
        data: folder of local questions; the hub when absent.
        limit: number of questions that will be asked (those are checked here).
        known: hash that the local questions must have (`data_key`); any when absent.

    Raises:
        ValueError: unknown or not a multiple choice task, questions that do not fit it, or an unreachable hub.
    """
    from lm_eval.api.task import ConfigurableTask

    config = load_definition(task, TASKS_FOLDER)
    if config.get("output_type") != "multiple_choice" or "process_results" in config or "class" in config:
        raise ValueError(
            f"task {task!r} is not a plain multiple choice task (output_type {config.get('output_type')!r}); "
            "score it with `lm_eval` itself on the exported adapter"
        )
    stock = [entry["metric"] for entry in config.get("metric_list") or ()]
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    if data is None:
        built = _fetch(ConfigurableTask, config, task)
    else:
        file = data_file(data, task)
        built = _with_records(ConfigurableTask, config, file, task, limit, read_records(file, known))
    if built.get_config("num_fewshot") is None:
        built.set_config(key="num_fewshot", value=0)
    built.set_fewshot_seed(seed=1234)  # the harness's default
    return built, "acc_norm" if "acc_norm" in stock else "acc"


def load_definition(task: str, folder: Path) -> dict[str, Any]:
    """Return the harness's configuration of a task, with `include` resolved.

    Raises:
        ValueError: neither `folder` nor the harness knows the task, or its file cannot be read.
    """
    if not re.fullmatch(r"[\w.+-]+", task) or ".." in task:
        raise ValueError(f"task {task!r} is not a task name; a task file is code, so it is never taken from a path")
    own = folder / f"{task}.yaml"
    path = own if own.is_file() else _stock_file(task, folder)
    try:
        config = _load_with_includes(path)
    except Exception as error:  # YAML, import and attribute errors of a file the user may have written
        raise ValueError(f"{path}: cannot be read as a task of the harness: {error}") from error
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return {**config, "task": task}


def _load_with_includes(path: Path) -> dict[str, Any]:
    """Like the harness's own loader; an `include` that is not beside the file is sought among the harness's tasks."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, recursive=False)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        places = [path.parent / include, Path(lm_eval.tasks.__file__).parent / include]
        found = next((p for p in places if p.is_file() and p.resolve() != path.resolve()), None)
        if found is None:
            raise ValueError(f"`include: {include}` is neither beside it nor among the harness's tasks")
        merged.update(_load_with_includes(found))
    return {**merged, **config}


@functools.cache
def _stock_index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _stock_file(task: str, folder: Path) -> Path:
    index = _stock_index()
    entry = index.task_index.get(task)
    if entry is not None and task in index.all_subtasks and entry.yaml_path is not None:
        return entry.yaml_path
    if entry is not None:
        members = ", ".join(sorted(entry.tags)) or "see the harness's documentation"
        raise ValueError(f"{task!r} is a group of tasks; name its tasks one by one ({members})")
    own = sorted(path.stem for path in folder.glob("*.yaml"))
    near = difflib.get_close_matches(task, [*own, *index.all_subtasks], n=3, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown task {task!r}; {hint}{folder} defines: {', '.join(own) or 'no task'}; "
        "`lm-eval ls tasks` lists those of the harness; llm_adapters/NAME scores generated answers"
    )


def _fetch(build: Any, config: dict[str, Any], task: str) -> Any:
    try:
        return build(config=config)
    except Exception as error:  # any of requests', huggingface_hub's and datasets' own kinds
        raise ValueError(
            f"task {task!r}: its questions could not be fetched from the hub ({type(error).__name__}: {error}). "
            f"Without network set `evaluation.data` to a folder that holds {task}.jsonl"
        ) from error


def _with_records(
    build: Any, config: dict[str, Any], file: Path, task: str, limit: int | None, records: Records
) -> Any:
    from datasets import Dataset

    if config.get("num_fewshot"):
        raise ValueError(
            f"task {task!r} asks for {config['num_fewshot']} examples in the prompt (num_fewshot), which local "
            "files do not hold; set it to 0 or leave `evaluation.data` out"
        )
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
    config = {**config, **splits, "dataset_kwargs": None}
    config.pop("fewshot_config", None)
    place = str(file)
    try:
        questions = Dataset.from_list([record for record, _ in records])
        config["custom_dataset"] = lambda **_: {"test": questions}
        built = build(config=config)
        for doc, (_, place) in zip(built.eval_docs, records[:limit], strict=False):  # noqa: B007
            choices, target = built.doc_to_choice(doc), built.doc_to_target(doc)
            if not built.multiple_input and isinstance(target, int) and not 0 <= target < len(choices):
                raise ValueError(f"the answer is choice {target + 1} of {len(choices)}")
            built.doc_to_text(doc)
    except Exception as error:  # jinja's, pyarrow's and the definition's own kinds
        raise ValueError(
            f"{place}: does not fit the definition of task {task!r} ({type(error).__name__}: {error}); "
            f"its fields must be those of the harness's data set {config.get('dataset_path')!r}"
        ) from error
    return built
