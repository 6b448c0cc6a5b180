"""Scores by lm-evaluation-harness, task by task, resumable."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatt_scale.evaluation import tasks as definitions
from metatt_scale.evaluation.generate import evaluation_mode
from metatt_scale.evaluation.llm_adapters import PREFIX, evaluate_llm_adapters, task_keys
from metatt_scale.evaluation.progress import quiet_harness, task_progress
from metatt_scale.evaluation.scores import Key, TaskScore, finished, package_version, record
from metatt_scale.recipe import EvaluationRecipe

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
    tasks_folder: Path | None = None,
) -> dict[str, TaskScore]:
    """Score `model` on the tasks of `settings` and return {task: score} in their order.

    Everything is checked before the first question is asked. After each task the results file is replaced, so an
    evaluation that was killed goes on with the task it was in. Tasks named `llm_adapters/NAME` are scored by
    generated answers. Under several ranks every rank must call this (a sharded model needs them all); the first
    one writes. Neither the random generators nor the modes of the modules are changed.

    Args:
        model: causal language model, adapted or not, in any precision.
        tokenizer: its tokenizer (not changed).
        settings: tasks, data folder, limit, batch size.
        results: JSON file that scores are kept in.
        label: name under which this model's scores are kept, for example "zero-shot".
        fingerprint: identifies backbone and adapter; another one makes old scores void.
        tasks_folder: task files in the harness's format; `recipes/tasks` of the checkout when absent.

    Raises:
        ValueError: unknown task, missing or broken data, unreachable hub.
    """
    results = Path(results)
    wanted = list(dict.fromkeys(settings.tasks))
    generated = tuple(task for task in wanted if task.startswith(PREFIX))
    keys = {task: _key(task, settings, fingerprint, tasks_folder) for task in wanted if not task.startswith(PREFIX)}
    # Missing data of the generated answers is to be told now, not after hours of the other tasks.
    task_keys(generated, settings, fingerprint)
    scores = finished(results, label, keys)
    pending = {task: key for task, key in keys.items() if task not in scores}
    if pending:
        scores |= _score_pending(model, tokenizer, settings, results, label, pending, tasks_folder)
    if generated:
        only = settings.model_copy(update={"tasks": generated})
        scores |= evaluate_llm_adapters(model, tokenizer, only, results, label, fingerprint)
    return {task: scores[task] for task in wanted}


def _score_pending(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationRecipe,
    results: Path,
    label: str,
    keys: Mapping[str, Key],
    folder: Path | None,
) -> dict[str, TaskScore]:
    """Score the tasks of `keys`, keeping each in the results file as soon as it is done."""
    scores = {}
    with quiet_harness():
        built = {task: definitions.build_task(task, settings.data, settings.limit, folder) for task in keys}
        with evaluation_mode(model), task_progress(len(keys)) as start:
            for task, (harness_task, metric) in built.items():
                begin = time.perf_counter()
                samples = _answers(model, tokenizer, task, harness_task, settings, start)
                seconds = round(time.perf_counter() - begin, 3)
                score = TaskScore(metric=metric, samples=samples, key=keys[task], seconds=seconds)
                record(results, label, task, score)
                logger.info("%s: acc %.4f, acc_norm %.4f", task, score.mean("acc"), score.mean("acc_norm"))
                scores[task] = score
    return scores


def _key(task: str, settings: EvaluationRecipe, fingerprint: str, folder: Path | None) -> Key:
    return {
        "fingerprint": fingerprint,
        "limit": settings.limit,
        "data": definitions.data_key(task, settings.data),
        "definition": definitions.definition_key(task, folder),
        "lm_eval": package_version("lm_eval"),
    }


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    harness_task: Any,
    settings: EvaluationRecipe,
    start: Any,
) -> dict[str, str]:
    """Return per metric one "0" or "1" a question."""
    # Not `simple_evaluate`: it seeds the global generators and collects a report of the environment every time.
    from lm_eval.evaluator import evaluate as run_harness

    from metatt_scale.evaluation.scorer import Scorer

    n_questions = len(harness_task.eval_docs)
    n_asked = min(n_questions, settings.limit or n_questions)
    n_choices = len(harness_task.doc_to_choice(harness_task.eval_docs[0]))
    # The harness gives a tokenizer that has none a padding token: let it do so to a copy.
    scorer = Scorer(model, copy.deepcopy(tokenizer), settings.batch_size, start(task, n_asked * n_choices))
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
