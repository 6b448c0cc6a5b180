"""Study files: what they define, and one clear message for each that cannot be used."""

import re
from pathlib import Path

import pytest
import yaml

from metatt_scale.recipe import RecipeError, check
from metatt_scale.study.opening import open_study
from metatt_scale.study.schema import Study
from tests.studies import CHOOSE, write_study

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "studies").glob("*.yaml"))
BAD = {
    "unknown key": ({"seed": [1]}, "unknown key `seed`", "did you mean `seeds`?"),
    "unknown key inside": ({"score": {"metric": ["a"]}}, "`score.metric`", "did you mean `score.metrics`?"),
    "no seeds": ({"seeds": []}, "`seeds` is []; it must not be empty", "Seeds of the reported runs"),
    "seed twice": ({"seeds": [1, 1]}, "`seeds` holds 1 twice"),
    "seed of another type": ({"seeds": ["1"]}, '`seeds.0` is "1"; give a whole number'),
    "no arms": ({"arms": None}, "neither `arms` nor `grid` is given"),
    "name no folder can have": ({"arms": {"a/b": []}}, '`arms.a/b` is "a/b"; it must match'),
    "nothing to report": ({"score": {}}, "neither `metrics` nor `tasks`"),
    "the same arm twice": (
        {"arms": {"a": ["adapter.rank=4"], "b": ["adapter.rank=4", "training.save_every=7"]}},
        "arms a and b define the same runs; remove one of them",
    ),
    "value twice in a grid": ({"grid": {"adapter.rank": [4, 4]}}, "two arms are named", "every value of `grid` once"),
    "value to choose twice": (
        {"choose": {**CHOOSE, "values": [1e-3, 0.001, 2e-3]}},
        "`choose.values` gives training.learning_rate=0.001 and training.learning_rate=0.001, which define the same",
    ),
    "value to choose in two spellings": (
        {"choose": {**CHOOSE, "values": [1, 1.0]}},
        "`choose.values` gives training.learning_rate=1 and training.learning_rate=1.0, which define the same runs",
    ),
    "unknown arm": ({"compare": [["rank2", "rank8"]]}, "`compare` names rank8; the arms are rank2, rank4"),
    "arm with itself": ({"compare": [["rank2", "rank2"]]}, "pairs rank2 with itself"),
    "no pair": ({"compare": [["rank2"]]}, "`compare.0` has too few entries"),
    "unknown recipe": ({"recipe": "other.yaml"}, "other.yaml: no such recipe"),
    "unknown recipe key": (
        {"arms": {"a": [], "b": ["adapter.rnk=4"]}},
        "studies/toy.yaml, arm b: ",
        "recipe.yaml with 'adapter.rnk=4': unknown key `adapter.rnk`",
        "did you mean `adapter.rank`?",
    ),
    "unknown key in a trial": (
        {"choose": {**CHOOSE, "overrides": ["data.validaton_size=40"]}},
        "studies/toy.yaml, arm rank2: ",
        "did you mean `data.validation_size`?",
    ),
    "no override": ({"base": ["adapter"]}, "override 'adapter': expected dotted.key=value"),
    "seed as an override": ({"base": ["seed=4"]}, "override 'seed=4': the study sets `seed` of every run"),
    "folder as an override": ({"base": ["output_dir=x"]}, "the study sets `output_dir` of every run; set `runs_dir`"),
    "choice that an arm has made": (
        {"choose": CHOOSE, "arms": {"a": ["training.learning_rate=1"]}},
        "of arm a sets what `choose` decides",
    ),
    "number that no evaluation has": (
        {"score": {"metrics": ["eval_los"]}},
        "arm rank2: `score` names eval_los, which this run does not report; evaluations give headline, eval_",
    ),
    "number of a classifier": (
        {"recipe": "../text.yaml"},
        "eval_accuracy, which this run does not report; evaluations",
    ),
    "task for a classifier": (
        {"score": {"tasks": ["boolq"]}},
        "`score` names the task boolq, a question to a language model, but the recipe has a `classifier`",
    ),
    "number to choose by": (
        {"choose": {**CHOOSE, "by": "eval_spearman"}},
        "arm rank2: `choose.by` names eval_spearman, which this run does not report",
    ),
    "no evaluations": (
        {"base": ["data.validation=[]"]},
        "`score` names eval_accuracy, which this run does not report; there are no evaluations; give",
    ),
    "direction of nothing": (
        {"score": {"metrics": ["eval_loss"], "higher_is_better": {"eval_acc": True}}},
        "`score.higher_is_better` names eval_acc, which is neither reported nor chosen by; these are eval_loss",
    ),
    "choice on what is reported": (
        {"choose": {**CHOOSE, "overrides": []}},
        "arm rank2 would choose training.learning_rate on the records of data.validation, which are also reported",
    ),
    "choice on what is reported, spelt otherwise": (
        {"choose": {**CHOOSE, "overrides": ["data.validation=[{path: ./x/../validation.json, split: test}]"]}},
        "on the records of data.validation, which are also reported",
    ),
    "choice on a part of what is reported": (
        {"choose": {**CHOOSE, "overrides": ["data.train=[{path: validation.json}]", *CHOOSE["overrides"]]}},
        "on the records of data.validation, which are also reported",
    ),
    "choice on the folder of what is reported": (
        {"choose": {**CHOOSE, "overrides": ["data.validation=[{path: .}]"]}},
        "on the records of data.validation, which are also reported",
    ),
    "choice on half of a split that is reported": (
        {
            "base": ["data.validation=[{path: a/b, subset: c, split: validation}]"],
            "choose": {
                **CHOOSE,
                "overrides": ["data.validation=[{path: a/b, subset: c, split: 'train+validation[:9]'}]"],
            },
        },
        "on the records of data.validation, which are also reported",
    ),
    "direction of the headline": (
        {"score": {"metrics": ["headline"], "higher_is_better": {"headline": False}}},
        "`score.higher_is_better` names headline, which is neither reported nor chosen by; these are eval_accuracy",
    ),
    "choice beside a split": (
        {"choose": CHOOSE, "base": ["data.validation=[]", "data.validation_size=9"]},
        "on records split off data.train, which are also reported; name files of their own",
    ),
    "choice by a reported task": (
        {"choose": {**CHOOSE, "by": "boolq"}, "score": {"tasks": ["boolq"]}},
        "`choose.by` is boolq, a task that is reported",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_study_is_one_message(tmp_path, monkeypatch, name):
    keys, *says = BAD[name]
    with pytest.raises(RecipeError) as error:
        open_study(write_study(tmp_path, monkeypatch, **keys))
    message = str(error.value)
    for words in says:
        assert words in message
    assert "Input should" not in message and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "the file is empty; a study is a mapping of keys such as `recipe:`"),
        ("arms: {a: [], a: []}", "key `a` appears twice"),
        ("seeds: !!python/tuple [1]", "tag !!python/tuple is not supported"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, says):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        open_study(path)
    with pytest.raises(RecipeError, match=r"no such study.*The folder holds: s\.yaml"):
        open_study(tmp_path / "t.yaml")


def test_the_readme_has_a_study_and_the_names_of_all(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "readme.yaml"
    path.write_text(re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0].replace("..", str(ROOT)))
    assert list(open_study(path).arms) == ["rank4", "rank8"]
    assert not [study.name for study in SHIPPED if f"`{study.stem}`" not in text]


def test_a_grid_is_run_by_every_arm(tmp_path, monkeypatch):
    grid = {"adapter.rank": [4, 8], "adapter.mode_order": [["input", "output"], None], "backbone.path": ["random:a"]}
    path = write_study(tmp_path, monkeypatch, base=["training.epochs=3"], arms={"a": ["adapter.alpha=1"]}, grid=grid)
    arms = open_study(path).arms
    assert list(arms) == [
        f"a,rank={rank},mode_order={order},path=random-a" for rank in (4, 8) for order in ("input-output", "null")
    ]
    assert arms["a,rank=4,mode_order=null,path=random-a"] == (
        *("training.epochs=3", "adapter.alpha=1", "adapter.rank=4", "adapter.mode_order=null"),
        'backbone.path="random:a"',
    )


def test_keys_that_end_alike_keep_their_sections(tmp_path, monkeypatch):
    grid = {"adapter.rank": [4], "data.cutoff_length": [64], "evaluation.limit": [1], "evaluation.batch_size": [2]}
    grid |= {"training.batch_size": [4]}
    arms = open_study(write_study(tmp_path, monkeypatch, arms=None, grid=grid)).arms
    assert list(arms) == ["rank=4,cutoff_length=64,limit=1,evaluation.batch_size=2,training.batch_size=4"]


def test_runs_know_their_folders_and_definitions(tmp_path, monkeypatch):
    opened = open_study(write_study(tmp_path, monkeypatch, choose=CHOOSE))
    trial = opened.trial("rank4", opened.candidates[0], 2)
    assert opened.candidates[0] == "training.learning_rate=0.001"
    assert str(trial.folder) == "runs/studies/toy/rank4/choose/training.learning_rate=0.001/seed-2"
    assert trial.overrides == ("adapter.rank=4", *CHOOSE["overrides"], "training.learning_rate=0.001")
    reported = opened.reported("rank4", opened.candidates[0], 2)
    assert str(reported.folder) == "runs/studies/toy/rank4/seed-2" and reported.digest != trial.digest
    assert reported.digest == opened.reported("rank4", opened.candidates[0], 3).digest


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_studies_are_studies(path):
    check(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), Study)
    assert f"python launch/study.py studies/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_studies_fit_their_recipes(path):
    assert open_study(path).arms
