"""Learned positions and embeddings of tokens: what exceeds them is refused before the first forward."""

import json

import pytest
import torch

from metatt_scale.backbone import byte_tokenizer, learned_positions
from metatt_scale.cli import main
from metatt_scale.data import tokenize_source
from metatt_scale.evaluation import evaluate
from metatt_scale.evaluation.generate import continue_tokens, generate
from metatt_scale.parallel import World
from metatt_scale.recipe import DataRecipe, DataSource, EvaluationRecipe
from tests.exports import untrained_run
from tests.questions import questions, write
from tests.tiny import MODELS, tiny_model, tokens
from tests.toy import CPU

LEARNED = {"gpt2": 64, "opt": 64, "bert": 64, "roberta": 64}


@pytest.fixture
def forwards():
    """Models get a hook that counts their forwards."""
    return Forwards()


class Forwards:
    def __init__(self):
        self.seen = []

    def __call__(self, model):
        model.register_forward_pre_hook(lambda *_: self.seen.append(1))
        return model


@pytest.mark.parametrize("name", MODELS)
def test_the_learned_positions_are_those_that_a_forward_takes(name):
    model = tiny_model(name).eval()
    assert learned_positions(model) == LEARNED.get(name)
    with torch.no_grad():
        model(tokens(1, 64))
        if name in LEARNED:
            with pytest.raises((IndexError, RuntimeError)):
                model(tokens(1, 65))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_no_text_is_longer_than_the_positions(name, forwards):
    model = forwards(tiny_model(name, vocab_size=300))
    prompts = [[5] * 60, [7] * 3]
    assert len(continue_tokens(model, byte_tokenizer(), prompts, CPU, 5)) == 2
    forwards.seen.clear()
    with pytest.raises(ValueError, match=rf"65 positions.*{type(model).__name__}.* 64 .*--max-new-tokens"):
        continue_tokens(model, byte_tokenizer(), prompts, CPU, 6)
    with pytest.raises(ValueError, match="300"):
        continue_tokens(model, byte_tokenizer(), [[299, 300]], CPU, 2)
    assert not forwards.seen


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("task", ["piqa", "llm_adapters/piqa"])
def test_questions_that_the_positions_cannot_hold(name, task, forwards, tmp_path, no_network):
    model = forwards(tiny_model(name, vocab_size=300))
    long = {**questions("piqa", 1)[0], "sol1": "long " * 30, "instruction": "which " * 30, "answer": "true"}
    write(tmp_path / "piqa.jsonl", [long])
    settings = EvaluationRecipe(tasks=(task,), data=str(tmp_path))
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has .*64 positions"):
        evaluate(model, byte_tokenizer(), settings, tmp_path / "r.json", "a", "f", world=World(device=CPU))
    assert not forwards.seen and not (tmp_path / "r.json").exists()


def test_an_empty_choice_is_told(byte_llama, byte_bpe, tmp_path, monkeypatch):
    monkeypatch.setattr("metatt_scale.evaluation.tasks.TASKS_FOLDER", tmp_path)
    definition = {"task": "colours", "output_type": "multiple_choice", "test_split": "test", "target_delimiter": ""}
    definition |= {"doc_to_text": "{{text}}", "doc_to_choice": ["red", ""], "doc_to_target": "label"}
    (tmp_path / "colours.yaml").write_text(json.dumps({**definition, "metric_list": [{"metric": "acc"}]}))
    write(tmp_path / "colours.jsonl", [{"text": "water", "label": 1}])
    settings = EvaluationRecipe(tasks=("colours",), data=str(tmp_path))
    with pytest.raises(ValueError, match="choice"):
        evaluate(byte_llama, byte_bpe, settings, tmp_path / "r.json", "a", "f", world=World(device=CPU))


# ---- prompts and records that are no text

HALF = "\ud800"


def test_a_prompt_that_is_no_text(byte_llama, byte_bpe):
    for prompt in (HALF, f"a{HALF}b", b"\xff".decode(errors="surrogateescape")):
        with pytest.raises(ValueError, match="prompt"):
            generate(byte_llama, byte_bpe, prompt, CPU, 3)


def test_a_prompt_of_the_command_line_that_is_no_text(tmp_path, capsys):
    run, _, _ = untrained_run(tmp_path)
    assert main(["generate", str(run), "--prompt", f"a{HALF}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the prompt")


@pytest.mark.parametrize("task", ["piqa", "llm_adapters/piqa"])
@pytest.mark.parametrize("field", ["goal", "instruction", "input", "unused"])
def test_questions_that_are_no_text(byte_llama, byte_bpe, tmp_path, no_network, task, field):
    good = {**questions("piqa", 1)[0], "instruction": "a", "input": "b", "answer": "true", "unused": {"a": "b"}}
    bad = {**good, field: {"a": [HALF]} if field == "unused" else HALF}
    write(tmp_path / "piqa.jsonl", [good, bad])
    settings = EvaluationRecipe(tasks=(task,), data=str(tmp_path))
    with pytest.raises(ValueError, match=r"piqa\.jsonl:2"):
        evaluate(byte_llama, byte_bpe, settings, tmp_path / "r.json", "a", "f", world=World(device=CPU))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}{{ m.name }}>{{ m.content }}{{ m.tools | tojson if m.tools }}"
    "{{ 1 // m.by if m.by is defined }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("extra", [{"name": HALF}, {"by": 0}, {"tools": {"a": 1}, "by": "x"}])
def test_a_chat_field_that_is_no_text_makes_one_bad_record(tmp_path, extra):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{**good[0], **extra}, good[1]]
    write(tmp_path / "a.jsonl", [{"messages": good}, {"messages": bad}])
    source = DataSource(path=str(tmp_path / "a.jsonl"))

    def tokenize(on_bad):
        recipe = DataRecipe(train=(source,), format="chat", on_bad_record=on_bad, cache_dir=str(tmp_path / "cache"))
        return tokenize_source(source, recipe, tokenizer)[1]

    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*data\.on_bad_record"):
        tokenize("error")
    counts = tokenize("skip")
    assert (counts["records"], counts["skipped"], counts["examples"]) == (1, 1, 1)
