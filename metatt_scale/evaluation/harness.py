"""Scores by lm-evaluation-harness, task by task, resumable."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatt_scale.data.cache import tokenizer_identity
from metatt_scale.evaluation import tasks as definitions
from metatt_scale.evaluation.generate import evaluation_mode
from metatt_scale.evaluation.llm_adapters import PREFIX, generated_answers, read_questions, task_keys
from metatt_scale.evaluation.progress import StartTask, quiet_harness, task_progress
from metatt_scale.evaluation.scores import (
    Key,
    TaskScore,
    finished,
    record,
    score_from_json,
    score_to_json,
)
from metatt_scale.parallel import Message, World
from metatt_scale.recipe import EvaluationRecipe
from metatt_scale.versions import package_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationRecipe,
    results: Path,
    label: str,
    fingerprint: str,
    *,
    world: World,
) -> dict[str, TaskScore]:
    """Score `model` on the tasks of `settings` and return {task: score} in their order.

    Everything is checked before the first question is asked. After each task the results file is replaced, so an
    evaluation that was killed goes on with the task it was in. Tasks named `llm_adapters/NAME` are scored by
    generated answers. Under several ranks every rank must call this: they share the batches of each task, and the
    first one reads and writes the results file. Neither the random generators nor the modules' modes are changed.

    Args:
        model: causal language model, adapted or not, in any precision, whole or sharded.
        tokenizer: its tokenizer (not changed).
        settings: tasks, data folder, limit, batch size.
        results: JSON file that scores are kept in.
        label: name under which this model's scores are kept, for example "zero_shot".
        fingerprint: identifies backbone and adapter; another one makes old scores void.
        world: the ranks of the job, and the device that this one computes on.

    Raises:
        ValueError: unknown task, missing or broken data, unreachable hub.
    """
    results = Path(results)
    wanted = list(dict.fromkeys(settings.tasks))
    generated = [task for task in wanted if task.startswith(PREFIX)]
    keys = task_keys(generated, settings, fingerprint)
    keys |= {task: _key(task, settings, fingerprint) for task in wanted if task not in keys}
    ids = tokenizer_identity(tokenizer)
    keys = {task: {**key, "tokenizer": ids} for task, key in keys.items()}
    scores = _known(results, label, keys, world)
    pending = [task for task in wanted if task not in scores]
    with quiet_harness(), task_progress(len(pending), shown=world.is_first) as start, evaluation_mode(model):
        jobs = {task: _job(task, model, tokenizer, settings, world, keys[task]) for task in pending}
        for task, (metric, answer) in jobs.items():
            begin = time.perf_counter()
            samples = answer(start)
            seconds = round(time.perf_counter() - begin, 3)
            scores[task] = score = TaskScore(metric=metric, samples=samples, key=keys[task], seconds=seconds)
            world.on_first(functools.partial(record, results, label, task, score))
            logger.info("%s: %s %.4f", task, metric, score.mean(metric))
    return {task: scores[task] for task in wanted}


Answer = Callable[[StartTask], dict[str, str]]
"""Asks a task's questions; returns per metric one "0" or "1" a question."""


def _known(results: Path, label: str, keys: Mapping[str, Key], world: World) -> dict[str, TaskScore]:
    """Return the scores that rank 0 finds in the results file."""

    def read() -> Message:
        return {task: score_to_json(score) for task, score in finished(results, label, keys).items()}, {}

    return {task: score_from_json(entry) for task, entry in world.from_first(read)[0].items()}


def _job(
    task: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationRecipe,
    world: World,
    key: Key,
) -> tuple[str, Answer]:
    """Return the metric a task is reported by, and what asks its questions."""
    known = None if settings.data is None else str(key["data"])
    if task.startswith(PREFIX):
        records = read_questions(task, settings, known)
        return "acc", lambda start: generated_answers(
            model, tokenizer, records, settings.batch_size, world, start(task, len(records))
        )
    harness_task, metric = definitions.build_task(task, settings.data, settings.limit, known)
    return metric, lambda start: _answers(model, tokenizer, task, harness_task, settings, world, start)


def _key(task: str, settings: EvaluationRecipe, fingerprint: str) -> Key:
    return {
        "fingerprint": fingerprint,
        "limit": settings.limit,
        "data": definitions.data_key(task, settings.data),
        "definition": definitions.definition_key(task),
        "lm_eval": package_version("lm_eval"),
    }


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    harness_task: Any,
    settings: EvaluationRecipe,
    world: World,
    start: StartTask,
) -> dict[str, str]:
    """Return per metric one "0" or "1" a question."""
    # Not `simple_evaluate`: it seeds the global generators and collects a report of the environment every time.
    from lm_eval.evaluator import evaluate as run_harness

    from metatt_scale.evaluation.scorer import Scorer

    n_questions = len(harness_task.eval_docs)
    n_asked = min(n_questions, settings.limit or n_questions)
    n_choices = len(harness_task.doc_to_choice(harness_task.eval_docs[0]))
    # The harness gives a tokenizer that has none a padding token: let it do so to a copy.
    advance = start(task, n_asked * n_choices)
    scorer = Scorer(model, copy.deepcopy(tokenizer), settings.batch_size, world, advance)
    output: Any = run_harness(
        lm=scorer,
        task_dict={"tasks": {task: harness_task}},
        limit=settings.limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    if scorer.truncated:
        logger.warning(
            "%s: %d sequences are longer than the model's %d positions and were cut at their beginning",
            task,
            scorer.truncated,
            scorer.max_length,
        )
    answered = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
    return {metric: "".join(str(int(s[metric])) for s in answered) for metric in ("acc", "acc_norm")}
