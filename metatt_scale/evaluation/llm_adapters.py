"""Generated answers to instruction prompts, as models trained on commonsense_170k are usually reported.

After Hu et al. 2023 (LLM-Adapters, `commonsense_evaluate.py`): the first admissible label in the output is the
answer, and an output without one counts as wrong. Here the model decodes greedily and writes at most 12 tokens
("the correct answer is solution1" needs fewer), where LLM-Adapters searches with 4 beams and 32 tokens, and goes
on from where the answer's first token starts (see `_prompt_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from metatt_scale.data.records import Record
from metatt_scale.data.templates import llm_adapters_prompt
from metatt_scale.evaluation.generate import check_prompts, continue_tokens
from metatt_scale.evaluation.progress import Advance
from metatt_scale.evaluation.scores import Key
from metatt_scale.evaluation.tasks import data_file, data_key, read_records
from metatt_scale.parallel import World
from metatt_scale.recipe import EvaluationRecipe
from metatt_scale.versions import package_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "llm_adapters/"
MAX_NEW_TOKENS = 12
_OPENING = "the correct answer is"
"""How the outputs of commonsense_170k begin."""

_FAMILIES = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)


def task_keys(tasks: Sequence[str], settings: EvaluationRecipe, fingerprint: str) -> dict[str, Key]:
    """Return what each task's score depends on.

    Raises:
        ValueError: no data folder, or a task without a file in it.
    """
    if tasks and settings.data is None:
        raise ValueError(
            f"task {tasks[0]!r} reads its records from a folder, but `evaluation.data` is not set; "
            f"set it to one that holds {tasks[0].removeprefix(PREFIX)}.jsonl"
        )
    return {
        task: {
            "fingerprint": fingerprint,
            "limit": settings.limit,
            "data": data_key(task.removeprefix(PREFIX), settings.data),
            "decoding": f"greedy, {MAX_NEW_TOKENS} tokens",
            "transformers": package_version("transformers"),
        }
        for task in tasks
    }


def admissible_labels(answer: str) -> tuple[str, ...]:
    """Return the labels among which `answer` is chosen.

    Raises:
        ValueError: `answer` is none of the known labels.
    """
    for family in _FAMILIES:
        if answer in family:
            return family
    raise ValueError(f"`answer` is {answer!r}; known labels: {', '.join(sum(_FAMILIES, ()))}")


def extract_answer(text: str, labels: Sequence[str]) -> str | None:
    """Return the first of `labels` that occurs in `text`, also inside a word; None where there is none."""
    found = re.search("|".join(labels), text)
    return found.group() if found else None


def read_questions(task: str, settings: EvaluationRecipe, known: str | None = None) -> list[Record]:
    """Return the records {instruction, input, answer} of a task, from `NAME.jsonl[.gz]` in the data folder.

    `known` is the hash that this file must have; any when absent.

    Raises:
        ValueError: missing or broken data.
    """
    assert settings.data is not None
    file = data_file(settings.data, task.removeprefix(PREFIX))
    records = read_records(file, known)[: settings.limit]
    for question, place in records:
        try:
            if not isinstance(question["instruction"], str):
                raise ValueError("`instruction` is not text")
            if not isinstance(question.get("input") or "", str):
                raise ValueError("`input` is not text")
            admissible_labels(question["answer"])
        except KeyError as error:
            raise ValueError(f"{place}: no field {error}; needed: instruction, answer") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return [question for question, _ in records]


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens that stand before the answer's first one in the training texts.

    The prompt ends in blanks, the last of which usually belongs to the answer's first word there: a model asked to
    go on after the prompt's own tokens would see what it was never trained on.
    """
    encoding = tokenizer(prompt + _OPENING, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    return [token for token, end in zip(encoding["input_ids"], ends, strict=True) if end <= len(prompt)]


def generated_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    batch_size: int,
    world: World,
    advance: Advance,
) -> dict[str, str]:
    """Return per metric one "0" or "1" a question, in the order of the records.

    The metrics are `acc`, and `unparsable` for outputs without an admissible label, which also count as wrong. The
    ranks take the batches in turn; where one has none left it repeats the first, as a sharded model needs them all.
    """
    prompts = [_prompt_tokens(tokenizer, llm_adapters_prompt(r["instruction"], r.get("input"))) for r in records]
    remedy = "leave the llm_adapters tasks out, or take a model with more"
    check_prompts(model, prompts, MAX_NEW_TOKENS, remedy)
    # Prompts of like length share a batch: less padding. The longest come first, so memory runs out early if ever.
    order = sorted(range(len(records)), key=lambda i: -len(prompts[i]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    outcome_2N = torch.zeros(2, len(records), dtype=torch.int64)  # right, unparsable
    for first in range(0, len(batches), world.size):
        mine = first + world.rank
        batch = batches[mine if mine < len(batches) else 0]
        asked, in_step = [prompts[i] for i in batch], world.size > 1
        texts = continue_tokens(model, tokenizer, asked, world.device, MAX_NEW_TOKENS, in_step=in_step)
        for i, text in zip(batch, texts, strict=True):
            if mine < len(batches):
                found = extract_answer(text, admissible_labels(records[i]["answer"]))
                outcome_2N[:, i] = torch.tensor([found == records[i]["answer"], found is None])
        advance(sum(map(len, batches[first : first + world.size])))
    right, unparsable = world.sum(outcome_2N.to(world.device)).tolist()
    return {"acc": "".join(map(str, right)), "unparsable": "".join(map(str, unparsable))}
