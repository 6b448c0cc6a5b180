"""Scores of a tiny random Llama: against an independent computation, the stock tasks, and after interruption."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from metatt_scale.evaluation import evaluate, harness, read_scores
from metatt_scale.evaluation.tasks import TASKS_FOLDER, build_task, load_definition
from metatt_scale.parallel import World
from tests.questions import METRICS, questions, recipe, write
from tests.toy import CPU

pytestmark = pytest.mark.usefixtures("no_network")
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "lm_eval"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in METRICS:
        write(folder / f"{task}.jsonl", questions(task))
    return folder


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """One sequence at a time in float32, no padding."""
    whole, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
    return sum(log_probabilities[i - 1, whole[i]].item() for i in range(start, len(whole)))


def requests(task: str, doc: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str], int]:
    """(context, continuation) per choice, the choices whose length acc_norm divides by, the right one."""
    match task:
        case "social_iqa":
            choices = [doc["answerA"], doc["answerB"], doc["answerC"]]
            context, right = f"Q: {doc['context']} {doc['question']}\nA:", int(doc["label"]) - 1
            return [(context, " " + choice) for choice in choices], choices, right
        case "winogrande":
            before, after = doc["sentence"].split("_")
            choices = [before + doc["option1"], before + doc["option2"]]
            return [(choice, " " + after.strip()) for choice in choices], choices, int(doc["answer"]) - 1
        case "boolq":
            context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
            return [(context, " no"), (context, " yes")], ["no", "yes"], doc["label"]
        case _:
            choices = [doc["sol1"], doc["sol2"]]
            context = f"Question: {doc['goal']}\nAnswer:"
            return [(context, " " + choice) for choice in choices], choices, doc["label"]


@pytest.mark.parametrize("task", ["social_iqa", "winogrande", "boolq", "piqa"])
def test_against_independent_log_likelihoods(
    task: str, byte_llama: LlamaForCausalLM, byte_bpe: PreTrainedTokenizerFast, data: Path, tmp_path: Path
) -> None:
    expected = {"acc": "", "acc_norm": ""}
    for doc in questions(task):
        pairs, choices, right = requests(task, doc)
        values = [log_likelihood(byte_llama, byte_bpe, *pair) for pair in pairs]
        normed = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        expected["acc"] += str(int(values.index(max(values)) == right))
        expected["acc_norm"] += str(int(normed.index(max(normed)) == right))
    settings = recipe(data, task, batch_size=5)
    score = evaluate(byte_llama, byte_bpe, settings, tmp_path / "r.json", "zero-shot", "f", world=World(device=CPU))[
        task
    ]
    assert score.samples == expected
    assert score.metric == METRICS[task]
    assert score.n == 12


def test_logits_of_the_last_positions_give_the_stock_numbers(
    byte_llama: LlamaForCausalLM, byte_bpe: PreTrainedTokenizerFast
) -> None:
    """Lengths of all kinds, shared contexts, and prompts beyond the model's positions."""
    from lm_eval.models.huggingface import HFLM

    from metatt_scale.evaluation.scorer import Scorer

    rng = random.Random(3)
    pairs: list[Any] = []
    for _ in range(40):
        context = [rng.randrange(2, 200) for _ in range(rng.randint(1, 30))]
        tail = [rng.randrange(2, 200) for _ in range(rng.randint(0, 6))]
        pairs += [(("", ""), context, [*tail, rng.randrange(2, 200)]) for _ in range(rng.randint(1, 3))]
    tokenizer = copy.deepcopy(byte_bpe)  # the harness adds a padding token
    advanced: list[int] = []
    ours: Any = Scorer(byte_llama, tokenizer, 7, World(device=torch.device("cpu")), advanced.append)
    stock_class: Any = HFLM
    stock = stock_class(pretrained=byte_llama, tokenizer=tokenizer, batch_size=7)
    for longest in (2048, 20):
        ours._max_length = stock._max_length = longest
        got = ours._loglikelihood_tokens(pairs)
        want = stock._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
        torch.testing.assert_close(
            torch.tensor([value for value, _ in got]), torch.tensor([value for value, _ in want])
        )
    assert sum(advanced) == 2 * len(pairs)
    assert ours.truncated == sum(len(c) + len(t) > 21 for _, c, t in pairs) > 0


def test_resume_modes_and_random_state(
    byte_llama: LlamaForCausalLM,
    byte_bpe: PreTrainedTokenizerFast,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    kills: list[str] = []
    answers = harness._answers

    def killed(model: Any, tokenizer: Any, task: str, *rest: Any) -> Any:
        assert not any(module.training for module in model.modules())
        if task == "piqa" and not kills:
            kills.append(task)
            raise KeyboardInterrupt
        asked.append(task)
        return answers(model, tokenizer, task, *rest)

    monkeypatch.setattr(harness, "_answers", killed)
    results = tmp_path / "results.json"
    settings = recipe(data, "social_iqa", "piqa", limit=5)
    byte_llama.train()
    byte_llama.model.layers[0].eval()
    modes = [module.training for module in byte_llama.modules()]
    state = torch.get_rng_state(), random.getstate()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(byte_llama, byte_bpe, settings, results, "tuned", "f", world=World(device=CPU))
        assert [module.training for module in byte_llama.modules()] == modes
        first = read_scores(results)["tuned"]["social_iqa"]
        scores = evaluate(byte_llama, byte_bpe, settings, results, "tuned", "f", world=World(device=CPU))
        assert [module.training for module in byte_llama.modules()] == modes
    finally:
        byte_llama.eval()
    assert asked == ["social_iqa", "piqa"]
    assert list(scores) == ["social_iqa", "piqa"]
    assert scores["social_iqa"] == first
    assert scores == read_scores(results)["tuned"]
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert byte_bpe.pad_token is None

    evaluate(
        byte_llama,
        byte_bpe,
        settings.model_copy(update={"batch_size": 3}),
        results,
        "tuned",
        "f",
        world=World(device=CPU),
    )
    assert len(asked) == 2
    for i, (changed, fingerprint) in enumerate([(settings, "g"), (recipe(data, "piqa", limit=4), "g")]):
        evaluate(byte_llama, byte_bpe, changed, results, "tuned", fingerprint, world=World(device=CPU))
        assert len(asked) == (4, 5)[i]


def stock_config(task: str) -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    include = yaml.safe_load((TASKS_FOLDER / f"{task}.yaml").read_text())["include"]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / include)
    assert config["task"] == task
    return config


@pytest.mark.parametrize("task", METRICS)
def test_definitions_are_the_stock_ones(task: str, data: Path) -> None:
    from lm_eval.api.task import ConfigurableTask

    stock = stock_config(task)
    ours = load_definition(task, TASKS_FOLDER)
    kept = ("doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "process_docs", "output_type")
    assert {key: ours.get(key) for key in kept} == {key: stock.get(key) for key in kept}
    built, metric = build_task(task, str(data), None)
    assert metric == METRICS[task]
    assert metric == ("acc_norm" if "acc_norm" in [m["metric"] for m in stock["metric_list"]] else "acc")
    # The stock task object, untouched but for where its rows come from, renders the same requests.
    rows = datasets.Dataset.from_list(questions(task))
    stock.pop("tag", None)
    stock["custom_dataset"] = lambda **_: {s: rows for s in ("train", "validation", "test")}
    theirs = ConfigurableTask(config=stock)
    theirs.set_config(key="num_fewshot", value=0)
    rendered = []
    sides: tuple[Any, ...] = (theirs, built)
    for side in sides:
        side.build_all_requests(limit=None, rank=0, world_size=1)
        docs = list(side.eval_docs)
        rendered.append(([i.args for i in side.instances], [side.doc_to_target(d) for d in docs]))
    assert rendered[0] == rendered[1]
    assert len(rendered[0][1]) == 12


def test_own_task_file_and_data(
    byte_llama: Any, byte_bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metatt_scale.evaluation.tasks.TASKS_FOLDER", tmp_path)
    definition = {
        "task": "colours", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{text}} is",
        "doc_to_choice": ["red", "blue"], "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(definition))
    write(tmp_path / "colours.jsonl", [{"text": "water", "label": 1}, {"text": "fire", "label": 0}])
    settings, results = recipe(tmp_path, "colours", limit=1), tmp_path / "r.json"
    score = evaluate(byte_llama, byte_bpe, settings, results, "zero-shot", "f", world=World(device=CPU))["colours"]
    assert score.n == 1
    assert set(score.samples) == {"acc", "acc_norm"}


def test_errors_come_before_the_first_question(
    byte_llama: Any, byte_bpe: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = type("Index", (), {"task_index": {}, "all_subtasks": ["copa", "piqa"]})
    monkeypatch.setattr("metatt_scale.evaluation.tasks._stock_index", index)
    write(data / "pika.jsonl", [{"goal": "a"}])
    broken = tmp_path / "broken"
    broken.mkdir()
    write(broken / "piqa.jsonl", [*questions("piqa", 2), {**questions("piqa", 1)[0], "label": 2}])
    write(broken / "social_iqa.jsonl", [{"context": "a", "question": "b"}])
    write(
        broken / "boolq.jsonl",
        [{"question": "a", "passage": 1, "label": 0}, {"question": 1, "passage": "", "label": 0}],
    )
    cases = [
        (recipe(data, "piqa", "copa"), r"'copa' has no data.*social_iqa"),
        (recipe(data, "piqa", "pika"), r"unknown task 'pika'; did you mean piqa"),
        (recipe(broken, "piqa"), r"piqa\.jsonl:3.*choice 3 of 2"),
        (recipe(broken, "social_iqa"), r"social_iqa\.jsonl.*does not fit"),
        (recipe(broken, "boolq"), r"boolq\.jsonl.*does not fit"),
        (recipe(None, "piqa"), r"'piqa'.*hub \(ConnectionError.*evaluation\.data"),
        (recipe(None, "llm_adapters/piqa"), r"evaluation\.data"),
        (recipe(data, "piqa", "llm_adapters/copa"), r"'copa' has no data"),
    ]  # fmt: skip
    results = tmp_path / "results.json"
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(byte_llama, byte_bpe, settings, results, "zero-shot", "f", world=World(device=CPU))
    assert not results.exists()


def test_generation_tasks_of_the_harness_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatt_scale.evaluation.tasks.TASKS_FOLDER", tmp_path)
    (tmp_path / "sums.yaml").write_text("task: sums\noutput_type: generate_until\n")
    with pytest.raises(ValueError, match="not a plain multiple choice task"):
        build_task("sums", str(tmp_path), None)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} (real questions) is absent")
def test_real_questions(byte_llama: Any, byte_bpe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = recipe(REAL, *METRICS, limit=4)
    with caplog.at_level(logging.INFO):
        scores = evaluate(
            byte_llama, byte_bpe, settings, tmp_path / "r.json", "zero-shot", "f", world=World(device=CPU)
        )
    assert {task: score.metric for task, score in scores.items()} == METRICS
    for score in scores.values():
        assert {metric: len(answers) for metric, answers in score.samples.items()} == {"acc": 4, "acc_norm": 4}
    assert not [line for line in caplog.records if line.name.startswith("lm_eval")]
