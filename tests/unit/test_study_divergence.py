"""Runs of a study that come to no usable end: they count as worst, and hold up nothing."""

from tests.studies import CHOOSE, lines_of, study, write_study

CHOOSE_RANK = {**CHOOSE, "key": "adapter.rank", "values": [4, 11], "seeds": [1]}


def test_a_value_that_diverges_counts_as_worst(tmp_path, monkeypatch, capsys):
    path = write_study(tmp_path, monkeypatch, choose=CHOOSE_RANK, arms={"a": []}, seeds=[1, 2])
    code, said = study(path)
    assert code == 0 and "a takes adapter.rank=4, by eval_accuracy" in said
    told = capsys.readouterr().err
    assert "a with adapter.rank=11, seed 1 diverged, which counts as worst" in told and "not finite" in told
    nothing = {"last": None, "best": None, "per_epoch": []}
    assert [line["scores"] for line in lines_of(path) if line.get("tried") == "adapter.rank=11"] == [
        {"eval_accuracy": nothing}
    ]
    assert study(path)[0] == 0 and len(lines_of(path)) == 5, "nothing is left, and nothing is tried again"


def test_an_arm_with_nothing_to_choose_from_does_not_hold_up_the_others(tmp_path, monkeypatch):
    arms = {"a": [], "b": ["training.learning_rate=1e-3"]}
    choose = {**CHOOSE_RANK, "key": "adapter.rank", "values": [11]}
    path = write_study(tmp_path, monkeypatch, choose=choose, arms={"b": arms["b"]}, seeds=[1])
    code, said = study(path)
    assert code == 1 and "arm b: eval_accuracy was finite with no value of adapter.rank" in said
    assert "no table yet" in said and len(lines_of(path)) == 1
    write_study(tmp_path, monkeypatch, choose={**choose, "values": [11, 4]}, arms=arms, seeds=[1])
    code, said = study(path)
    assert code == 0 and "| a " in said and "| b " in said


def test_a_reported_run_that_diverges_is_in_the_table(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, arms={"a": ["adapter.rank=4"], "b": ["adapter.rank=11"]}, seeds=[1])
    code, said = study(path)
    row = next(line for line in said.splitlines() if line.startswith("| b "))
    assert code == 0 and row.count("not finite") == 2
