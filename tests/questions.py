"""Questions of random words for every task, and recipes that ask them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from metatt_scale.recipe import EvaluationRecipe

METRICS = {
    "boolq": "acc", "piqa": "acc_norm", "social_iqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc",
    "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm",
}  # fmt: skip
WORDS = "red green blue stone water bird tree house runs sleeps a very long answer indeed".split()


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def questions(task: str, n: int = 12) -> list[dict[str, Any]]:
    rng = random.Random(task)
    match task:
        case "boolq":
            return [{"question": sentence(rng), "passage": sentence(rng), "label": i % 2} for i in range(n)]
        case "piqa":
            return [
                {"goal": sentence(rng), "sol1": sentence(rng), "sol2": sentence(rng), "label": i % 2}
                for i in range(n)
            ]
        case "social_iqa":
            names = ("context", "question", "answerA", "answerB", "answerC")
            return [{**{name: sentence(rng) for name in names}, "label": str(1 + i % 3)} for i in range(n)]
        case "hellaswag":
            return [
                {
                    "activity_label": "Building [title]", "ctx_a": f"A [step] {sentence(rng)}.", "ctx_b": "the bird",
                    "endings": [f"[header] {sentence(rng)}  {k}" for k in range(4)], "label": str(i % 4),
                }
                for i in range(n)
            ]  # fmt: skip
        case "winogrande":
            return [
                {
                    "sentence": f"The stone hit the bird so _ {sentence(rng)}.",
                    "option1": "stone", "option2": "bird it", "answer": str(1 + i % 2),
                }
                for i in range(n)
            ]  # fmt: skip
        case _:
            stem = "question_stem" if task == "openbookqa" else "question"
            choices = {"text": ["red", "a blue tree", "water", "green"], "label": ["A", "B", "C", "D"]}
            return [{stem: sentence(rng), "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(n)]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe(data: Path | None, *tasks: str, **changes: Any) -> EvaluationRecipe:
    return EvaluationRecipe(tasks=tasks, data=None if data is None else str(data), **changes)
