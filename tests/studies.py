"""Studies whose runs are done in no time: a child that writes what training would leave, without a model.

The score of a run is a function of its recipe, so that tests know it: accuracy = rank / 100 + seed / 1000, less
abs(learning rate - 2e-3), and its best is (rank + 6) / 200 above that. Rank 13 fails, rank 11 diverges.
"""

import io
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import yaml
from rich.console import Console

from metatt_scale.recipe import load_recipe
from metatt_scale.record_files import local_content
from metatt_scale.study.command import run

TEXT = {
    "output_dir": "unused",
    "backbone": {"path": "model"},
    "data": {"train": [{"path": "train.json"}], "validation": [{"path": "validation.json"}]},
    "training": {"learning_rate": 2e-3},
}
"""Of a language model; that of STUDY is a classifier's."""
RECIPE = {
    **TEXT,
    "classifier": {"labels": 2},
    "data": {**TEXT["data"], "format": "sentences", "text_fields": ["text"]},
}
STUDY = {
    "recipe": "../recipe.yaml",
    "arms": {"rank2": ["adapter.rank=2"], "rank4": ["adapter.rank=4"]},
    "seeds": [1, 2, 3],
    "score": {"metrics": ["eval_accuracy"]},
}
CHOOSE = {
    "key": "training.learning_rate",
    "values": [1e-3, 2e-3, 4e-3],
    "seeds": [1, 2],
    "overrides": ["data.validation=[]", "data.validation_size=40"],
    "by": "eval_accuracy",
}
MACHINE = {"device": "test", "torch": "0", "metatt_scale": "0", "git_commit": None}


def write_study(folder: Path, monkeypatch, **keys) -> Path:
    """Write a recipe and a study with `keys` laid over STUDY, and work in their folder."""
    monkeypatch.chdir(folder)
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "text.yaml").write_text(yaml.safe_dump(TEXT))
    study = folder / "studies" / "toy.yaml"
    study.write_text(yaml.safe_dump({k: v for k, v in {**STUDY, **keys}.items() if v is not None}, sort_keys=False))
    return study


def fake_commands(opened, run):
    """What a run is made of here."""
    own = (f"seed={run.seed}", f"output_dir={run.folder}")
    return [(sys.executable, "-m", "tests.studies", str(run.recipe), *run.overrides, *own)]


def study(path: Path, make_commands=fake_commands, machine=lambda _: MACHINE, **options) -> tuple[int, str]:
    """Run the command; return its exit code and what it printed."""
    console = Console(file=io.StringIO(), width=500, markup=False)
    given = {"study": str(path), "budget_minutes": 5.0, "dry_run": False, "table_only": False, **options}
    code = run(Namespace(**given), console, make_commands, machine)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def lines_of(path: Path) -> list[dict]:
    """The lines of a study's results."""
    results = path.parent / "results" / "toy.jsonl"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _train(arguments: list[str]) -> int:
    recipe = load_recipe(arguments[0], arguments[1:])
    folder, rank = Path(recipe.output_dir), recipe.adapter.rank
    assert isinstance(rank, int)
    if rank == 13:
        print("error: thirteen is unlucky", file=sys.stderr)
        return 2
    if rank == 11:
        print("error: stopped at step 5: loss or gradient was not finite", file=sys.stderr)
        return 3
    if rank == 60:
        print("working", flush=True)
        time.sleep(60)
    accuracy = rank / 100 + recipe.seed / 1000 - abs(recipe.training.learning_rate - 2e-3)
    values = [accuracy - 0.1, accuracy + (rank + 6) / 200, accuracy]
    lines = [{"step": k, "loss": 1.0, "eval_accuracy": value, "eval_loss": None} for k, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "adapter").mkdir()
    contents = {path: found for s in recipe.data.train if (found := local_content(path := s.path)) is not None}
    description = {
        "contents": contents,
        "recipe": recipe.model_dump(mode="json"),
        "ranks": [rank] * 3,
        "trainable_parameters": 1000 * rank,
    }
    (folder / "adapter" / "metatt.json").write_text(json.dumps(description))
    return 0


if __name__ == "__main__":
    sys.exit(_train(sys.argv[1:]))
