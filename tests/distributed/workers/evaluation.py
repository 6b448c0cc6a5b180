"""Two ranks score one toy model together under every engine; rank 0 writes the answers to FOLDER/NAME.json."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

from metatt_scale.backbone import byte_tokenizer
from metatt_scale.ending import leave
from metatt_scale.evaluation import evaluate
from metatt_scale.parallel import Launch, Strategy, World, join
from metatt_scale.recipe import EvaluationRecipe
from tests.distributed.equivalence import make_trainer
from tests.toy import CPU, toy_recipe

TASKS = ("winogrande", "llm_adapters/winogrande", "arc_easy")
STRATEGIES: tuple[Strategy, ...] = ("replicate", "fsdp2", "zero3")


def write_questions(folder: Path) -> None:
    """Seven questions a task: no number of ranks but one divides them into full batches of two."""
    words = ["stone", "bird", "water", "a tree", "the house"]
    pairs = [
        {"sentence": f"The {words[i % 5]} hit {words[i % 3]} so _ fell.", "option1": words[i % 5], "option2": "it"}
        | {"answer": str(1 + i % 2)}
        for i in range(7)
    ]
    choices = {"text": ["red", "a blue tree", "water", "green"], "label": ["A", "B", "C", "D"]}
    school = [{"question": f"Which {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(7)]
    told = [{"instruction": f"Choose {i}", "input": "", "answer": f"option{1 + i % 2}"} for i in range(7)]
    for name, records in (("winogrande", pairs), ("arc_easy", school), ("told/winogrande", told)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def answers(folder: Path, world: World, strategy: Strategy, name: str) -> dict[str, dict[str, str]]:
    """Every task's answers, scored by the ranks of `world` together."""
    recipe = toy_recipe(folder, data={"cache_dir": str(folder / "cache")})
    trainer = make_trainer(recipe, world, Launch(strategy=strategy))
    found = {}
    for tasks, data in ((("winogrande", "arc_easy"), folder), (("llm_adapters/winogrande",), folder / "told")):
        settings = EvaluationRecipe(tasks=tasks, data=str(data), batch_size=2)
        results = folder / f"results-{name}-{data.name}.json"
        scores = evaluate(trainer.model, byte_tokenizer(), settings, results, "tuned", "f", world=world)
        found |= {task: score.samples for task, score in scores.items()}
        again = evaluate(trainer.model, byte_tokenizer(), settings, results, "tuned", "f", world=world)
        assert {t: again[t].samples for t in again} == {t: scores[t].samples for t in scores}, (
            "what rank 0 finds in the results file is known to all"
        )
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    alone = answers(folder, World(device=CPU), "replicate", "alone-" + os.environ["RANK"])
    with join(CPU, timedelta(seconds=120), group=True) as world:
        together = {s: answers(folder, world, s, s) for s in STRATEGIES}
        (folder / f"answers-{world.rank}.json").write_text(json.dumps({"alone": alone, **together}))
    leave(0)
