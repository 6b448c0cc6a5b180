"""Studies over several recipes: arms are rows, recipes are columns, every arm chooses on each."""

import csv
import json

import pytest
import yaml

from metatt_scale.recipe import RecipeError, validate
from metatt_scale.study.opening import open_study
from tests.studies import CHOOSE, RECIPE, TEXT, lines_of, study, write_study

TWICE = {"easy": "../recipe.yaml", "hard": "../recipe.yaml"}
APART = {"hard": ["training.batch_size=8"]}


def write(folder, monkeypatch, **keys):
    given = {"recipe": None, "recipes": TWICE, "columns": APART, "score": {"metrics": ["headline"]}, **keys}
    return write_study(folder, monkeypatch, **given)


def table_of(text, title):
    """The rows of the table under a title, as lists of cells."""
    lines = text[text.index(f"**{title}") :].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


def test_arms_are_rows_and_recipes_are_columns(tmp_path, monkeypatch):
    recipes, columns = dict.fromkeys(("plain", "slow"), "../recipe.yaml"), {"slow": ["training.learning_rate=3e-3"]}
    code, said = study(write(tmp_path, monkeypatch, recipes=recipes, columns=columns, compare=[["rank4", "rank2"]]))
    assert code == 0 and "rank4@slow, seed 1: headline 0.0400 (best 0.0900); 0:00:0" in said
    path = tmp_path / "studies" / "toy.yaml"
    lines = lines_of(path)
    assert len(lines) == 12 and {line["arm"] for line in lines} == {
        *("rank2@plain", "rank2@slow", "rank4@plain", "rank4@slow")
    }
    assert all(line["scores"]["headline"] == line["scores"]["eval_accuracy"] for line in lines)
    text = (tmp_path / "studies" / "results" / "toy.md").read_text()
    head, _, *rows = table_of(text, "headline, last evaluation")
    assert head == ["arm", "parameters x 10^3", "plain (accuracy)", "slow (accuracy)", "mean"]
    assert rows == [
        ["rank2", "2", "_0.0220 ± 0.0006_", "_0.0210 ± 0.0006_", "_0.0215 ± 0.0006_"],
        ["rank4", "4", "**0.0420 ± 0.0006**", "**0.0410 ± 0.0006**", "**0.0415 ± 0.0006**"],
    ]
    best = table_of(text, "headline, best evaluation of each run among those with the ranks of its last one: chosen")
    assert best[3][2:] == ["**0.0920 ± 0.0006**", "**0.0910 ± 0.0006**", "**0.0915 ± 0.0006**"]
    for column in ("headline of plain", "headline of slow", "headline, mean over columns"):
        assert f"- rank4 - rank2, {column}: +0.0200 ± 0.0000 at 95 % over 3 common seeds" in text
    (_, row) = csv.DictReader((tmp_path / "studies" / "results" / "toy.csv").read_text().splitlines())
    assert (row["arm"], row["trainable_parameters"], row["plain_seeds"]) == ("rank4", "4000", "1 2 3")
    assert float(row["slow_headline"]) == pytest.approx(0.041) and float(row["mean_headline"]) == pytest.approx(
        0.0415
    )
    assert float(row["mean_headline_best"]) == pytest.approx(0.0915)


def test_every_arm_chooses_on_every_recipe(tmp_path, monkeypatch):
    choose = {**CHOOSE, "by": "headline", "columns": {"hard": ["training.max_steps=1"]}}
    path = write(tmp_path, monkeypatch, choose=choose, arms={"a": []}, seeds=[1])
    code, said = study(path, dry_run=True)
    assert code == 0 and "12 runs are left, and 2 that wait for a choice" in said
    trial = open_study(path).trial("a@hard", "training.learning_rate=0.001", 2)
    assert str(trial.folder) == "runs/studies/toy/a@hard/choose/training.learning_rate=0.001/seed-2"
    assert trial.overrides[0] == "training.batch_size=8" and trial.overrides[-2] == "training.max_steps=1"
    assert "training.max_steps=1" not in open_study(path).trial("a@easy", "training.learning_rate=0.001", 2).overrides
    code, said = study(path)
    chosen = [line for line in lines_of(path) if "chosen" in line]
    assert code == 0 and [(line["arm"], line["by"]) for line in chosen] == [
        ("a@easy", "headline"),
        ("a@hard", "headline"),
    ]
    assert table_of(said, "training.learning_rate, as chosen")[2] == ["a", "0.002", "0.002"]
    assert study(path)[0] == 0 and len(lines_of(path)) == 12 + 2 + 2, "a finished study has nothing left"


def test_what_is_not_finished_has_no_mean(tmp_path, monkeypatch):
    """And a column of a language model, of whose loss less is better, is never averaged with scores."""
    path = write(
        tmp_path, monkeypatch, recipes={"easy": "../recipe.yaml"}, columns=None, arms={"a": []}, seeds=[1, 2]
    )
    assert study(path)[0] == 0
    write(tmp_path, monkeypatch, arms={"a": []})
    code, said = study(path, table_only=True)
    _, _, row = table_of(said, "headline, last")
    assert (
        code == 0
        and row[2:] == ["**0.1615 ± 0.0005** (2 of 3)", "", ""]
        and "Without a finished run: a@hard." in said
    )
    write(
        tmp_path,
        monkeypatch,
        recipes={"easy": "../recipe.yaml", "text": "../text.yaml"},
        columns=None,
        arms={"a": []},
    )
    results = tmp_path / "studies" / "results" / "toy.jsonl"
    lines = lines_of(path)
    losses = [
        {**line, "arm": "a@text", "digest": open_study(path).reported("a@text", None, 1).digest} for line in lines
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *losses]))
    _, said = study(path, table_only=True)
    assert table_of(said, "headline, last")[0][2:] == ["easy (accuracy)", "text (loss)"]


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"recipe": "../recipe.yaml"}, "both `recipe` and `recipes` are given; name one recipe, or several"),
        ({"recipes": None, "columns": None}, "neither `recipe` nor `recipes` is given"),
        ({"columns": {"cola": []}}, "`columns` has cola, but `recipes` easy, hard"),
        ({"choose": {**CHOOSE, "columns": {"cola": []}}}, "`choose.columns` has cola, but `recipes` easy, hard"),
        ({"recipes": None, "recipe": "../recipe.yaml"}, "`columns` has hard, but `recipes` is not given"),
        (
            {"columns": None, "recipes": {"mean": "../recipe.yaml"}},
            "`recipes` has a column mean, which is the mean over all",
        ),
        ({"columns": None, "recipes": {"a@b": "../recipe.yaml"}}, '`recipes.a@b` is "a@b"; it must match'),
        ({"columns": None}, "rank2@easy and rank2@hard define the same runs"),
        ({"compare": [["rank2@easy", "rank4"]]}, "`compare` names rank2@easy; the arms are rank2, rank4"),
        (
            {"choose": {**CHOOSE, "overrides": []}},
            "arm rank2@easy would choose training.learning_rate on the records",
        ),
    ],
)
def test_bad_columns_are_one_message(tmp_path, monkeypatch, keys, says):
    with pytest.raises(RecipeError) as error:
        open_study(write(tmp_path, monkeypatch, **keys))
    assert says in str(error.value)


def test_a_missing_headline_is_told_by_its_key(tmp_path, monkeypatch, capsys):
    (tmp_path / "numbers.yaml").write_text(yaml.safe_dump({**RECIPE, "classifier": {"labels": 1}}))
    keys = {"recipes": {"numbers": "../numbers.yaml"}, "columns": None, "arms": {"a": []}, "seeds": [1]}
    path = write(tmp_path, monkeypatch, **keys)
    assert study(path)[0] == 1 and "has no headline (eval_spearman); it has eval_accuracy" in capsys.readouterr().err


def test_the_headline_of_a_recipe():
    sources = [{"path": "t.json", "task": name} for name in "ab"]
    tasks = {"a": {"labels": 2}, "b": {"labels": 1}}
    joint = {**RECIPE, "classifier": {}, "tasks": tasks, "data": {**RECIPE["data"], "train": sources}}
    joint["data"]["validation"] = sources
    of = {"eval_loss": TEXT, "eval_mean": joint, "eval_accuracy": RECIPE}
    of["eval_matthews"] = {**RECIPE, "classifier": {"labels": 2, "metric": "matthews"}}
    of["eval_spearman"] = {**RECIPE, "classifier": {"labels": 1}}
    assert {key: validate(recipe, "toy").headline for key, recipe in of.items()} == {key: key for key in of}
    only = {**joint, "tasks": {"a": {"labels": 2}}, "data": {**joint["data"], "train": sources[:1]}}
    only["data"]["validation"] = sources[:1]
    assert validate(only, "toy").headline == "eval_mean", "one task with a name is as several"
