"""The results file: appended, durable, and mended where a crash cut it short."""

import json
import math

import pytest

from metatt_scale.study.agenda import agenda_of, unused
from metatt_scale.study.opening import open_study
from metatt_scale.study.results import Results
from tests.studies import CHOOSE, lines_of, study, write_study

LEARNED = {"trainable_parameters": 2000, "ranks": [2, 2, 2]}


def line(run, **more):
    scores = {"eval_accuracy": {"last": 0.5, "best": 0.5, "per_epoch": [0.5]}}
    known = {"arm": run.arm, "seed": run.seed, "tried": run.tried, "digest": run.digest}
    return {**known, "overrides": list(run.overrides), "scores": scores, "seconds": 1.0, **LEARNED, **more}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    return open_study(write_study(tmp_path, monkeypatch))


def test_what_is_appended_is_read_again(opened):
    results, run = Results(opened.results), opened.reported("rank2", None, 1)
    results.append(line(run))
    for known in (results, Results(opened.results)):
        assert known.of(run) == line(run) and known.has(run, ["eval_accuracy"]) and not known.has(run, ["eval_f1"])
        assert known.of(opened.reported("rank2", None, 2)) is None
    left = agenda_of(opened, results).left
    assert [(run.arm, run.seed) for run in left] == [("rank4", 1), *((a, s) for s in (2, 3) for a in opened.arms)]


@pytest.mark.parametrize("end", ['{"arm": "rank2", "se', '{"arm": "rank2", "seed": 2}', "\u00e4"])
def test_a_last_line_cut_short_is_dropped_and_the_rest_kept(opened, end):
    runs = [opened.reported("rank2", None, seed) for seed in (1, 2)]
    Results(opened.results).append(line(runs[0]))
    with opened.results.open("a") as file:
        file.write(end)
    before = opened.results.read_bytes()
    results = Results(opened.results)
    assert results.cut_short == end and results.of(runs[1]) is None and opened.results.read_bytes() == before
    results.append(line(runs[1]))
    assert [json.loads(text)["seed"] for text in opened.results.read_text().splitlines()] == [1, 2]


def test_a_line_cut_within_a_character_is_dropped(opened):
    run = opened.reported("rank2", None, 1)
    opened.results.parent.mkdir()
    opened.results.write_bytes('{"arm": "\u00e4'.encode()[:-1])
    results = Results(opened.results)
    assert results.cut_short == '{"arm": "\ufffd'
    results.append(line(run))
    assert Results(opened.results).of(run) == line(run)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\n"])
def test_what_only_looks_like_the_end_of_a_line_is_none(opened, separator):
    """Python ends lines at more characters than JSON escapes."""
    runs = [opened.reported("rank2", None, seed) for seed in (1, 2)]
    results, text = Results(opened.results), f"data.prompt=a{separator}b"
    results.append(line(runs[0], overrides=[text]))
    again = Results(opened.results).of(runs[0])
    assert again is not None and again["overrides"] == [text]


def test_a_line_that_could_not_be_read_again_is_not_written(opened):
    results, run = Results(opened.results), opened.reported("rank2", None, 1)
    with pytest.raises(ValueError, match="seconds"):
        results.append(line(run, seconds=None))
    assert not opened.results.exists()


def test_a_whole_last_line_without_its_end_is_kept(opened):
    runs = [opened.reported("rank2", None, seed) for seed in (1, 2)]
    opened.results.parent.mkdir()
    opened.results.write_text(json.dumps(line(runs[0])))
    results = Results(opened.results)
    results.append(line(runs[1]))
    assert results.cut_short is None and len(opened.results.read_text().splitlines()) == 2


DEEP = pytest.param(b"[" * 100_000, id="deep")


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"arm": "a"}', b'{"arm": "a", "digest": 3}', b"\xff", DEEP])
def test_a_broken_line_inside_is_told_with_its_number(opened, bad):
    opened.results.parent.mkdir()
    good = json.dumps(line(opened.reported("rank2", None, 1))).encode()
    opened.results.write_bytes(good + b"\n" + bad + b"\n")
    with pytest.raises(ValueError, match=r"toy\.jsonl, line 2: not a line of results .*; fix it, or take the file"):
        Results(opened.results)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": {"a": {"lst": 0.5, "best": 0.5, "per_epoch": []}}}, "`scores.a.last` is missing"),
        ({"scores": {"a": 0.5}}, "`scores.a` is 0.5; it must be a valid dictionary"),
        ({"scores": {"a": {"last": "0.5", "best": None, "per_epoch": []}}}, '`scores.a.last` is "0.5"; it must be a'),
        ({"scores": {"a": {"last": math.nan, "best": None, "per_epoch": []}}}, "it must be a finite number"),
        ({"ranks": None}, "`ranks` is null; it must be a valid list"),
        ({"trainable_parameters": None}, "`trainable_parameters` is null; it must be a valid integer"),
        ({"seed": "1"}, '`seed` is "1"; it must be a valid integer'),
        ({"seconds": True}, "`seconds` is true; it must be a valid number"),
        ({"git_commit": 7}, "`git_commit` is 7; it must be a valid string"),
        ({"chosen": "a=1", "by": "eval_loss", "means": {"a=1": "low"}}, '`means.a=1` is "low"'),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_line_edited_by_hand_is_told_by_its_key(opened, change, said):
    good = line(opened.reported("rank2", None, 1))
    opened.results.parent.mkdir()
    opened.results.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(ValueError, match=r"toy\.jsonl, line 2: not a line of results") as caught:
        Results(opened.results)
    assert said in str(caught.value) and "fix it, or take" in str(caught.value) and "\n" not in str(caught.value)


def test_a_result_of_another_definition_is_refused(opened):
    run = opened.reported("rank2", None, 1)
    Results(opened.results).append(line(run, digest="other", overrides=["adapter.rank=3"]))
    with pytest.raises(ValueError, match=r"rank2, seed 1 .* were adapter\.rank=3, now they are adapter\.rank=2, or"):
        agenda_of(opened, Results(opened.results))


@pytest.mark.parametrize("by", ["eval_accuracy", "eval_loss"])
def test_of_equal_values_the_first_is_chosen(tmp_path, monkeypatch, by):
    opened = open_study(write_study(tmp_path, monkeypatch, choose={**CHOOSE, "by": by}, arms={"a": []}))
    results = Results(opened.results)
    for tried in opened.candidates:
        for seed in CHOOSE["seeds"]:
            scores = {by: {"last": 0.5, "best": 0.5, "per_epoch": [0.5]}}
            results.append(line(opened.trial("a", tried, seed), scores=scores))
    assert agenda_of(opened, results).chosen["a"]["chosen"] == "training.learning_rate=0.001"


def test_of_equal_scores_the_lesser_loss_is_chosen(tmp_path, monkeypatch):
    opened = open_study(write_study(tmp_path, monkeypatch, choose={**CHOOSE, "by": "eval_accuracy"}, arms={"a": []}))
    results, losses = Results(opened.results), dict(zip(opened.candidates, (0.7, 0.6, 0.65), strict=True))
    for tried, loss in losses.items():
        for seed in CHOOSE["seeds"]:
            last = {"eval_accuracy": 0.5, "eval_loss": loss}
            scores = {name: {"last": value, "best": value, "per_epoch": [value]} for name, value in last.items()}
            results.append(line(opened.trial("a", tried, seed), scores=scores))
    assert agenda_of(opened, results).chosen["a"]["chosen"] == opened.candidates[1]


@pytest.mark.parametrize("recipes", [None, {"one": "../recipe.yaml"}], ids=["one recipe", "columns"])
def test_arms_are_compared_seed_by_seed(tmp_path, monkeypatch, recipes):
    keys = {"recipe": None, "recipes": recipes} if recipes else {}
    path = write_study(tmp_path, monkeypatch, compare=[["rank4", "rank2"], ["rank2", "rank4"]], **keys)
    opened = open_study(path)
    results = Results(opened.results)
    for arm in opened.arms:
        more, seeds = (0.02, (1, 2, 3)) if arm.startswith("rank4") else (0.0, (2, 3))
        for seed in seeds:
            score = {"last": more + seed / 1000, "best": None, "per_epoch": []}
            results.append(line(opened.reported(arm, None, seed), scores={"eval_accuracy": score}))
    _, said = study(path, table_only=True)
    name = "eval_accuracy of one" if recipes else "eval_accuracy"
    for pair, gain in (("rank4 - rank2", "+0.0200"), ("rank2 - rank4", "-0.0200")):
        assert f"- {pair}, {name}: {gain} ± 0.0000 at 95 % over 2 common seeds" in said


def test_results_that_the_study_no_longer_has_are_counted(opened, monkeypatch, tmp_path):
    results = Results(opened.results)
    for seed in (1, 2):
        results.append(line(opened.reported("rank4", None, seed)))
    smaller = open_study(write_study(tmp_path, monkeypatch, seeds=[2, 3]))
    assert unused(smaller, results) == 1 and unused(opened, results) == 0


def test_the_recipe_belongs_to_the_definition(tmp_path, monkeypatch):
    """Its comments and its folders do not."""
    path = write_study(tmp_path, monkeypatch, seeds=[1])
    assert study(path)[0] == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# words\n" + recipe.read_text().replace("unused", "elsewhere"))
    from metatt_scale.study.runs import resolve

    resolve.cache_clear()
    assert study(path)[0] == 0 and len(lines_of(path)) == 2
    recipe.write_text(recipe.read_text().replace("0.002", "0.003"))
    resolve.cache_clear()
    with pytest.raises(ValueError, match=r"are the same, so the recipe has changed \(.*recipe\.yaml\)\. Give"):
        study(path)
