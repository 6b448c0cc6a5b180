"""A study sees that the records changed which its results were made with."""

import json
from pathlib import Path

import pytest

from metatt_scale.study.contents import changed_files
from metatt_scale.study.opening import open_study
from metatt_scale.study.outcome import is_trained
from tests.studies import fake_commands, lines_of, study, write_study


@pytest.fixture
def done(tmp_path, monkeypatch):
    """A finished study of one arm and one seed, whose records are there."""
    path = write_study(tmp_path, monkeypatch, arms={"rank2": ["adapter.rank=2"]}, seeds=[1])
    for name in ("train.json", "validation.json"):
        Path(name).write_text("[]")
    assert study(path)[0] == 0
    return path


@pytest.mark.parametrize("name", ["train.json", "validation.json"])
def test_a_result_of_other_records_is_refused(done, name):
    assert lines_of(done)[0]["data"].keys() == {"train.json", "validation.json"}
    before = Path(name).read_text()
    Path(name).write_text("[1]")
    with pytest.raises(ValueError, match=rf"toy\.jsonl holds a result of rank2, seed 1 .*{name}"):
        study(done)
    Path(name).write_text(before)
    assert study(done)[0] == 0 and len(lines_of(done)) == 1


def test_a_table_needs_no_records(done):
    Path("train.json").unlink()
    code, said = study(done, table_only=True)
    assert code == 0 and "rank2" in said


def test_results_of_an_earlier_version_know_no_records(done):
    results = done.parent / "results" / "toy.jsonl"
    line = json.loads(results.read_text())
    del line["data"]
    results.write_text(json.dumps(line) + "\n")
    Path("train.json").write_text("[1]")
    assert study(done)[0] == 0 and len(lines_of(done)) == 1


def test_a_run_that_was_trained_on_other_records_is_not_taken(done):
    run = open_study(done).reported("rank2", None, 1)
    assert is_trained(run)
    (done.parent / "results" / "toy.jsonl").unlink()
    Path("train.json").write_text("[1]")
    assert not is_trained(open_study(done).reported("rank2", None, 1))


def test_records_that_change_while_the_study_runs(tmp_path, monkeypatch, capsys):
    path = write_study(tmp_path, monkeypatch, arms={"rank2": ["adapter.rank=2"]}, seeds=[1])
    Path("train.json").write_text("[]")

    def commands(opened, run):
        Path("train.json").write_text("[1]")
        return fake_commands(opened, run)

    assert study(path, commands)[0] == 1 and not lines_of(path)
    assert "other settings or records" in capsys.readouterr().err


def test_a_folder_and_the_questions_of_tasks_count(tmp_path, monkeypatch):
    for name in ("data", "questions"):
        (tmp_path / name).mkdir()
    text = {"recipe": "../text.yaml", "score": {"tasks": ["llm_adapters/boolq", "piqa"]}}
    keys = ["evaluation.data=questions", "data.train=[{path: data}]", "data.validation=[]"]
    path = write_study(tmp_path, monkeypatch, **text, arms={"a": keys})

    def contents():
        return open_study(path).reported("a", None, 1).data

    assert contents() == {}
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    (tmp_path / "questions" / "boolq.jsonl").write_text("{}")
    before = contents()
    assert before.keys() == {"data", "questions/boolq.jsonl"} and not changed_files(before, contents())
    (tmp_path / "data" / "b.jsonl").write_text("{}")
    assert changed_files(before, contents()) == ["data"]
    (tmp_path / "questions" / "boolq.jsonl").write_text("{} ")
    assert changed_files(before, contents()) == ["data", "questions/boolq.jsonl"]
