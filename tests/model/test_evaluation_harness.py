"""Scores of a tiny random Llama: against an independent computation, the stock tasks, and after interruption."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from metatt_scale.data.templates import llm_adapters_prompt
from metatt_scale.evaluation import evaluate, harness, read_scores
from metatt_scale.evaluation.generate import continue_tokens, generate
from metatt_scale.evaluation.llm_adapters import MAX_NEW_TOKENS, extract_answer
from metatt_scale.evaluation.tasks import TASKS_FOLDER, build_task, load_definition
from metatt_scale.parallel import World
from metatt_scale.recipe import EvaluationRecipe

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "lm_eval"
METRICS = {
    "boolq": "acc", "piqa": "acc_norm", "social_iqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc",
    "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm",
}  # fmt: skip
WORDS = "red green blue stone water bird tree house runs sleeps a very long answer indeed".split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def questions(task: str, n: int = 12) -> list[dict[str, Any]]:
    rng = random.Random(task)
    match task:
        case "boolq":
            return [{"question": sentence(rng), "passage": sentence(rng), "label": i % 2} for i in range(n)]
        case "piqa":
            return [
                {"goal": sentence(rng), "sol1": sentence(rng), "sol2": sentence(rng), "label": i % 2}
                for i in range(n)
            ]
        case "social_iqa":
            names = ("context", "question", "answerA", "answerB", "answerC")
            return [{**{name: sentence(rng) for name in names}, "label": str(1 + i % 3)} for i in range(n)]
        case "hellaswag":
            return [
                {
                    "activity_label": "Building [title]", "ctx_a": f"A [step] {sentence(rng)}.", "ctx_b": "the bird",
                    "endings": [f"[header] {sentence(rng)}  {k}" for k in range(4)], "label": str(i % 4),
                }
                for i in range(n)
            ]  # fmt: skip
        case "winogrande":
            return [
                {
                    "sentence": f"The stone hit the bird so _ {sentence(rng)}.",
                    "option1": "stone", "option2": "bird it", "answer": str(1 + i % 2),
                }
                for i in range(n)
            ]  # fmt: skip
        case _:
            stem = "question_stem" if task == "openbookqa" else "question"
            choices = {"text": ["red", "a blue tree", "water", "green"], "label": ["A", "B", "C", "D"]}
            return [{stem: sentence(rng), "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in METRICS:
        write(folder / f"{task}.jsonl", questions(task))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe(data: Path | None, *tasks: str, **changes: Any) -> EvaluationRecipe:
    return EvaluationRecipe(tasks=tasks, data=None if data is None else str(data), **changes)


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
    task: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
) -> None:
    expected = {"acc": "", "acc_norm": ""}
    for doc in questions(task):
        pairs, choices, right = requests(task, doc)
        values = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        normed = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        expected["acc"] += str(int(values.index(max(values)) == right))
        expected["acc_norm"] += str(int(normed.index(max(normed)) == right))
    settings = recipe(data, task, batch_size=5)
    score = evaluate(model, tokenizer, settings, tmp_path / "r.json", "zero-shot", "f")[task]
    assert score.samples == expected
    assert score.metric == METRICS[task]
    assert score.n == 12


def test_logits_of_the_last_positions_give_the_stock_numbers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
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
    tokenizer = copy.deepcopy(tokenizer)  # the harness adds a padding token
    advanced: list[int] = []
    ours: Any = Scorer(model, tokenizer, 7, World(device=torch.device("cpu")), advanced.append)
    stock_class: Any = HFLM
    stock = stock_class(pretrained=model, tokenizer=tokenizer, batch_size=7)
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
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
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
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state(), random.getstate()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, settings, results, "tuned", "f")
        assert [module.training for module in model.modules()] == modes
        first = read_scores(results)["tuned"]["social_iqa"]
        scores = evaluate(model, tokenizer, settings, results, "tuned", "f")
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert asked == ["social_iqa", "piqa"]
    assert list(scores) == ["social_iqa", "piqa"]
    assert scores["social_iqa"] == first
    assert scores == read_scores(results)["tuned"]
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert tokenizer.pad_token is None

    evaluate(model, tokenizer, settings.model_copy(update={"batch_size": 3}), results, "tuned", "f")
    assert len(asked) == 2
    for i, (changed, fingerprint) in enumerate([(settings, "g"), (recipe(data, "piqa", limit=4), "g")]):
        evaluate(model, tokenizer, changed, results, "tuned", fingerprint)
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


def test_own_task_file_and_data(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    definition = {
        "task": "colours", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{text}} is",
        "doc_to_choice": ["red", "blue"], "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(definition))
    write(tmp_path / "colours.jsonl", [{"text": "water", "label": 1}, {"text": "fire", "label": 0}])
    settings, results = recipe(tmp_path, "colours", limit=1), tmp_path / "r.json"
    score = evaluate(model, tokenizer, settings, results, "zero-shot", "f", tasks_folder=tmp_path)["colours"]
    assert score.n == 1
    assert set(score.samples) == {"acc", "acc_norm"}


def test_errors_come_before_the_first_question(
    model: Any, tokenizer: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            evaluate(model, tokenizer, settings, results, "zero-shot", "f")
    assert not results.exists()


def test_generation_tasks_of_the_harness_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sums.yaml").write_text("task: sums\noutput_type: generate_until\n")
    with pytest.raises(ValueError, match="not a plain multiple choice task"):
        build_task("sums", str(tmp_path), None, tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} (real questions) is absent")
def test_real_questions(model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = recipe(REAL, *METRICS, limit=4)
    with caplog.at_level(logging.INFO):
        scores = evaluate(model, tokenizer, settings, tmp_path / "r.json", "zero-shot", "f")
    assert {task: score.metric for task, score in scores.items()} == METRICS
    for score in scores.values():
        assert {metric: len(answers) for metric, answers in score.samples.items()} == {"acc": 4, "acc_norm": 4}
    assert not [line for line in caplog.records if line.name.startswith("lm_eval")]


@pytest.fixture
def instructions(tmp_path: Path) -> Iterator[Path]:
    rng = random.Random(1)
    records = [
        {"instruction": sentence(rng) * (1 + i), "input": "", "answer": f"answer{1 + i % 4}", "source": "x"}
        for i in range(6)
    ]  # fmt: skip
    write(tmp_path / "arc_easy.jsonl", records)
    yield tmp_path


def test_llm_adapters(
    model: Any, tokenizer: Any, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metatt_scale.evaluation.llm_adapters as module

    calls: list[int] = []

    def answering(model: Any, tokenizer: Any, prompts: list[list[int]], n: int, in_step: bool) -> list[str]:
        """Says "answer1" to all questions but the shortest, to which it says nothing of use."""
        calls.append(len(prompts))
        assert n == MAX_NEW_TOKENS and not in_step
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        assert all("### Response:" in text for text in texts)
        return ["hm" if len(text) == min(map(len, everything)) else "the answer1" for text in texts]

    lines = (instructions / "arc_easy.jsonl").read_text().splitlines()
    everything = [llm_adapters_prompt(json.loads(line)["instruction"], "") for line in lines]
    monkeypatch.setattr(module, "continue_tokens", answering)
    settings = recipe(instructions, "llm_adapters/arc_easy", batch_size=4)
    results = tmp_path / "r.json"
    scores = evaluate(model, tokenizer, settings, results, "tuned", "f")
    score = scores["llm_adapters/arc_easy"]
    shortest = min(range(6), key=lambda i: len(everything[i]))
    right = "".join(str(int(i % 4 == 0 and i != shortest)) for i in range(6))
    assert score.samples == {"acc": right, "unparsable": "".join(str(int(i == shortest)) for i in range(6))}
    assert calls == [4, 2]
    assert evaluate(model, tokenizer, settings, results, "tuned", "f") == scores
    assert calls == [4, 2]
    evaluate(model, tokenizer, settings, results, "tuned", "g")
    assert calls == [4, 2, 4, 2]


def test_llm_adapters_bad_records(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    settings = recipe(tmp_path, "llm_adapters/piqa")
    for bad in ({"instruction": "a", "answer": "b"}, {"instruction": "a"}, {"instruction": 1, "answer": "true"}):
        write(tmp_path / "piqa.jsonl", [bad])
        with pytest.raises(ValueError, match=r"piqa\.jsonl:1"):
            evaluate(model, tokenizer, settings, tmp_path / "r.json", "tuned", "f")


def test_batched_generation_is_that_of_single_prompts(model: LlamaForCausalLM, tokenizer: Any) -> None:
    model.train()
    prompts = ["a bird", "the stone was very red", "x"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    together = continue_tokens(model, tokenizer, ids, 6)
    assert together == [generate(model, tokenizer, prompt, 6) for prompt in prompts]
    assert model.training
    model.eval()
    # Greedy decoding by hand, without a cache.
    tokens = list(ids[1])
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert together[1] == tokenizer.decode(tokens[len(ids[1]) :], skip_special_tokens=True)
    assert extract_answer(together[0], ("solution1",)) is None
    with pytest.raises(ValueError, match="empty"):
        generate(model, tokenizer, "", 3)
    with pytest.raises(ValueError, match="temperature"):
        generate(model, tokenizer, "a", 3, temperature=-1)
    assert isinstance(generate(model, tokenizer, "a", 3, temperature=0.7), str)
