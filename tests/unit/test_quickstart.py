"""The quickstart's questions: what is read out of the wheel, and that nothing is used unverified."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from metatt_scale import quickstart
from metatt_scale.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


def request(number, answer, label):
    doc = {
        "context": f"C{number}.",
        "question": "Why?",
        "answerA": "a",
        "answerB": "b",
        "answerC": "c",
        "label": label,
    }
    return json.dumps({"idx": answer, "doc": doc})


def test_each_training_question_once_with_its_true_answer():
    lines = [request(n, answer, label) for n, label in ((0, "2"), (1, "3")) for answer in range(3)]
    records = list(quickstart._training_records(gzip.compress("\n".join(lines).encode())))
    assert records == [
        {"instruction": "Q: C0. Why?\nA:", "input": "", "output": " b"},
        {"instruction": "Q: C1. Why?\nA:", "input": "", "output": " c"},
    ]


def test_another_checksum_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(quickstart._TRAIN, b"something else")
    with zipfile.ZipFile(buffer) as wheel, pytest.raises(ValueError, match="another checksum"):
        quickstart._verified(wheel, quickstart._TRAIN)


def test_the_recipe_reads_from_the_cache_folder_wherever_it_is(tmp_path):
    recipe = quickstart._with_questions(load_recipe(RECIPE), tmp_path)
    assert recipe.data.train[0].path == str(tmp_path / "train.jsonl")
    assert recipe.data.train[0].limit == 6000  # the rest of the source is the recipe's
    assert recipe.evaluation.data == str(tmp_path)
