"""Results file, paired differences, table, local task files and LLM-Adapters' answer extraction: no model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metatt_scale.evaluation import TaskScore, paired_difference, read_scores, score_table
from metatt_scale.evaluation.llm_adapters import _prompt_tokens, admissible_labels, extract_answer
from metatt_scale.evaluation.scores import finished, record
from metatt_scale.evaluation.tasks import TASKS_FOLDER, data_file, definition_key, read_records

EIGHT = {"boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"}


def score(acc: str, norm: str | None = None, metric: str = "acc", data: str = "d") -> TaskScore:
    samples = {"acc": acc} if norm is None else {"acc": acc, "acc_norm": norm}
    return TaskScore(metric=metric, samples=samples, key={"data": data, "fingerprint": "f"}, seconds=1.5)


def test_mean_and_standard_error() -> None:
    s = score("1101")
    assert s.n == 4
    assert s.mean("acc") == 0.75
    # Sample variance of (1, 1, 0, 1) is (3 * 0.0625 + 0.5625) / 3 = 0.25; its error is sqrt(0.25 / 4).
    assert s.stderr("acc") == pytest.approx(0.25, abs=1e-15)
    assert math.isnan(score("1").stderr("acc"))


def test_paired_difference_by_hand() -> None:
    before, after = score("1100"), score("1011")
    # Gains 0, -1, 1, 1: mean 1/4, squared deviations 1/16 + 25/16 + 9/16 + 9/16 = 44/16, variance 44/48.
    mean, error = paired_difference(before, after, "acc")
    assert mean == pytest.approx(0.25, abs=1e-15)
    assert error == pytest.approx(math.sqrt(44 / 48 / 4), abs=1e-15)
    assert paired_difference(before, before, "acc") == (0.0, 0.0)


@pytest.mark.parametrize("other", [score("110"), score("1100", data="another")])
def test_paired_difference_needs_the_same_questions(other: TaskScore) -> None:
    with pytest.raises(ValueError, match="same"):
        paired_difference(score("1100"), other, "acc")


def test_results_file_keeps_everything_else(tmp_path: Path) -> None:
    results = tmp_path / "run" / "results.json"
    assert read_scores(results) == {}
    record(results, "zero-shot", "piqa", score("1010", "1110", metric="acc_norm"))
    content = json.loads(results.read_text())
    results.write_text(json.dumps({**content, "note": "kept"}))
    record(results, "fine-tuned", "piqa", score("1", "0"))
    content = json.loads(results.read_text())
    assert content["note"] == "kept"
    assert set(content["versions"]) == {
        "metatt_scale", "torch", "transformers", "lm_eval", "bitsandbytes", "python",
    }  # fmt: skip
    assert content["git_commit"] is None or len(content["git_commit"].removesuffix("-dirty")) == 40
    entry = content["scores"]["zero-shot"]["piqa"]
    assert (entry["n"], entry["acc"], entry["acc_norm"], entry["metric"]) == (4, 0.5, 0.75, "acc_norm")
    assert content["scores"]["fine-tuned"]["piqa"]["acc_stderr"] is None
    assert read_scores(results)["zero-shot"]["piqa"] == score("1010", "1110", metric="acc_norm")


def test_only_equal_keys_are_finished(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    record(results, "a", "piqa", score("10"))
    key = score("10").key
    assert set(finished(results, "a", {"piqa": key, "boolq": key})) == {"piqa"}
    assert finished(results, "b", {"piqa": key}) == {}
    assert finished(results, "a", {"piqa": {**key, "fingerprint": "g"}}) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"scores": {"a": {"piqa": {}}}}', '{"scores": [1]}'])
def test_foreign_results_file(tmp_path: Path, text: str) -> None:
    results = tmp_path / "results.json"
    results.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_scores(results)


def test_table_fits_80_columns() -> None:
    tasks = sorted(EIGHT)
    before = {task: score("1010" * 500, "0000" * 500, metric="acc_norm") for task in tasks}
    after = {task: score("1110" * 500, "1000" * 500, metric="acc_norm") for task in tasks}
    before |= {f"llm_adapters/{task}": score("1010" * 500) for task in tasks}
    after |= {f"llm_adapters/{task}": score("1010" * 500) for task in tasks}
    console = Console(width=80, markup=False)
    with console.capture() as capture:
        console.print(score_table({"zero-shot": before, "fine-tuned": after}))
    text = capture.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    assert ["arc_challenge", "2000", "acc", "50.0", "75.0", "+25.0", "±", "1.0"] in lines
    assert ["acc_norm", "*", "0.0", "25.0", "+25.0", "±", "1.0"] in lines
    assert ["average", "acc", "50.0", "75.0", "+25.0", "±", "0.3"] in lines
    assert ["arc_challenge", "2000", "acc", "50.0", "50.0", "+0.0", "±", "0.0"] in lines


def test_table_of_one_label_and_of_nothing() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(score_table({"zero-shot": {"piqa": score("1010")}}))
    assert "50.0 ± 28.9" in capture.get()
    assert "average" not in capture.get()
    with console.capture() as capture:
        console.print(score_table({"zero-shot": {"piqa": score("1")}}))
    assert "100.0" in capture.get() and "nan" not in capture.get()  # a single question has no standard error
    for nothing in ({}, {"a": {"piqa": score("1")}, "b": {"boolq": score("1")}}):
        with pytest.raises(ValueError, match="no task"):
            score_table(nothing)


def test_data_files(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "piqa.jsonl.gz", "wt") as file:
        file.write('{"goal": "a"}\n{"goal": "b", "more": 1}\n')
    (tmp_path / "boolq.jsonl").write_text("")
    path = data_file(tmp_path, "piqa")
    assert [record["goal"] for record, _ in read_records(path)] == ["a", "b"]
    with pytest.raises(ValueError, match=r"'copa' has no data.*boolq, piqa"):
        data_file(tmp_path, "copa")
    with pytest.raises(ValueError, match="no such folder"):
        data_file(tmp_path / "absent", "copa")
    with pytest.raises(ValueError, match=r"boolq\.jsonl: no questions"):
        read_records(data_file(tmp_path, "boolq"))


@pytest.mark.parametrize("line", ["{", "[1]", '{"other": 1}', '{"goal": '])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text('{"goal": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"piqa\.jsonl:2"):
        read_records(path)


def test_shipped_task_files() -> None:
    assert {path.stem for path in TASKS_FOLDER.glob("*.yaml")} == EIGHT
    assert len({definition_key(task) for task in EIGHT}) == 8
    assert definition_key("copa") == "lm_eval"


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("the correct answer is true", "false", "true"),
        (" false. It is not true", "true", "false"),
        ("the correct answer is solution2", "solution1", "solution2"),
        ("answer4 or answer1", "answer1", "answer4"),
        ("answer5", "answer1", "answer5"),
        ("theending3", "ending1", "ending3"),
        ("option2\noption1", "option1", "option2"),
        ("ending1", "answer1", None),
        ("The correct answer is True", "true", None),
        ("answer6", "answer1", None),
        ("", "true", None),
    ],
)
def test_first_admissible_label_is_the_answer(text: str, answer: str, expected: str | None) -> None:
    assert extract_answer(text, admissible_labels(answer)) == expected


def test_unknown_label() -> None:
    with pytest.raises(ValueError, match="solution3"):
        admissible_labels("solution3")


def test_generation_starts_where_the_answers_first_token_does() -> None:
    letters = "abcdefghijklmnopqrstuvwxyzĠ:"
    pieces = {piece: i for i, piece in enumerate([*letters, "Ġt", "ĠĠ"])}
    inner = Tokenizer(models.BPE(vocab=pieces, merges=[("Ġ", "t"), ("Ġ", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)

    def tokens(text: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(_prompt_tokens(tokenizer, text)))

    assert tokenizer.tokenize("a:  ") == ["a", ":", "ĠĠ"]
    assert tokenizer.tokenize("a:  the") == ["a", ":", "Ġ", "Ġt", "h", "e"]
    assert tokens("a:  ") == ["a", ":", "Ġ"]
    assert tokens("a:") == ["a", ":"]
