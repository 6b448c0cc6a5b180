import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from metatt_scale.data import llm_adapters_prompt
from metatt_scale.data.templates import RenderingError, render, render_chat
from metatt_scale.data.tokens import answer_tokens, tokenize_records
from metatt_scale.recipe import DataRecipe, DataSource

SENTENCES = ["the correct answer is option1", "what is the answer to this question", "Größe 漢字 αβγ"] * 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]


def make_tokenizer(kind="bytes", *, bos=False, eos=False, chat_template: str | None = CHAT_TEMPLATE):
    """A byte-level BPE (offsets `trimmed` of blanks or not), or a BPE with Llama's ▁, trained on a few sentences."""
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind != "metaspace" else ["▁", *"\n:#.,?q"],
    )
    if kind == "metaspace":
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    core.train_from_iterator([*SENTENCES, llm_adapters_prompt("q", "q"), llm_adapters_prompt("q")] * 2, trainer)
    if bos or eos:
        single = ["<bos>"] * bos + ["$A"] + ["<eos>"] * eos
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    elif kind == "trimmed":
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def recipe(**keys):
    return DataRecipe(train=(DataSource(path="unused"),), **keys)


def fail(message):
    raise AssertionError(message)


def tokenize(tokenizer, *records, on_bad=fail, **keys):
    return tokenize_records([(record, "file:1") for record in records], recipe(**keys), tokenizer, on_bad)


def answers(tokenizer, table, i=0):
    """Decode the targets of example i."""
    tokens, flags = table.example(i)
    text = tokenizer.decode(tokens[flags])
    assert isinstance(text, str)
    return text


QUESTION = {"instruction": "what is this", "input": "", "output": "the correct answer is option1"}
WITH_INPUT = {**QUESTION, "input": "a question"}


def test_llm_adapters_prompts_to_the_blank():
    gap = " " * 16
    assert llm_adapters_prompt("do {x}") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
        f" \n\n{gap}### Instruction:\n{gap}do {{x}}\n{gap}\n{gap}### Response:\n{gap}"
    )
    assert llm_adapters_prompt("do", "this") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request. \n\n{gap}### Instruction:\n{gap}do\n{gap}\n"
        f"{gap}### Input:\n{gap}this\n{gap}\n{gap}### Response:\n{gap}"
    )
    assert llm_adapters_prompt("do", "") == llm_adapters_prompt("do")


def test_rendered_answers_are_the_outputs():
    tokenizer = make_tokenizer()
    for record in (QUESTION, WITH_INPUT):
        for template in ("llm_adapters", "plain"):
            text, [(start, end)] = render(record, "instruction", template, tokenizer)
            assert text[start:end] == record["output"] and end == len(text)
    assert render(WITH_INPUT, "instruction", "plain", tokenizer).text == (
        "what is this" + "a question" + "the correct answer is option1"
    )
    assert render({"text": "abc"}, "text", "plain", tokenizer) == ("abc", [(0, 3)])


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "metaspace"])
@pytest.mark.parametrize("record", [QUESTION, WITH_INPUT], ids=["without input", "with input"])
def test_only_the_answer_and_the_end_are_targets(kind, record):
    tokenizer = make_tokenizer(kind)
    table, counts = tokenize(tokenizer, record, cutoff_length=512)
    tokens, flags = table.example(0)
    assert answers(tokenizer, table).strip() == "the correct answer is option1<eos>"
    # Tokenised whole: the ids are those of the text, with one end appended.
    text = render(record, "instruction", "llm_adapters", tokenizer).text
    assert tokens.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert not flags[: len(flags) - table.targets[0]].any()  # the answer is one run at the end
    assert counts["targets"] == flags.sum() == table.targets[0]


def test_a_token_over_the_boundary_is_a_target():
    offsets = np.array([[0, 0], [0, 3], [3, 8], [8, 8], [8, 10], [10, 12], [0, 0]])
    assert answer_tokens(offsets, [(5, 10)]).tolist() == [False, False, True, True, True, False, False]
    assert answer_tokens(offsets, [(0, 3), (10, 12)]).tolist() == [False, True, False, False, False, True, False]


@pytest.mark.parametrize("kind", ["bytes", "trimmed"])
def test_blanks_and_split_characters_inside_an_answer_are_targets(kind):
    tokenizer = make_tokenizer(kind)
    for output in ("a    b   ", "漢字 ☃ 🙂", "  indented\n\n  twice"):
        record = {"instruction": "q:", "output": output}
        table, _ = tokenize(tokenizer, record, template="plain", cutoff_length=256)
        assert answers(tokenizer, table) == output + "<eos>"


def test_special_tokens_of_the_tokenizer():
    plain = make_tokenizer()("what is thisthe correct answer is option1")["input_ids"]
    for bos, eos in ((True, False), (False, True), (True, True)):
        tokenizer = make_tokenizer(bos=bos, eos=eos)
        table, _ = tokenize(tokenizer, QUESTION, template="plain")
        tokens, flags = table.example(0)
        assert tokens.tolist() == [1] * bos + plain + [2]  # one end, whoever adds it
        assert flags[-1] and not flags[0]


def test_the_cut():
    tokenizer = make_tokenizer(bos=True)
    whole, counts = tokenize(tokenizer, QUESTION, cutoff_length=512)
    n, k = int(whole.lengths[0]), int(whole.targets[0])
    assert counts["truncated"] == 0 and k > 4

    exact, counts = tokenize(tokenizer, QUESTION, cutoff_length=n - 1)  # room for the text, none for the end
    assert exact.example(0)[0].tolist() == whole.example(0)[0][:-1].tolist()
    assert counts["truncated"] == 0

    shorter, counts = tokenize(tokenizer, QUESTION, cutoff_length=n - 3)
    assert shorter.example(0)[0].tolist() == whole.example(0)[0][:-3].tolist()
    assert shorter.targets.tolist() == [k - 3] and counts["truncated"] == 1

    table, counts = tokenize(tokenizer, QUESTION, {**QUESTION, "instruction": "is " * 200}, cutoff_length=n)
    assert len(table) == 1 and counts["dropped"] == counts["truncated"] == 1


def test_the_cut_takes_the_end_of_a_tokenizer_that_cuts_on_the_left():
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    tokenizer("x", truncation=True, max_length=4)  # leaves its setting behind
    table, _ = tokenize(
        tokenizer, {"text": "what is the answer to this question " * 9}, format="text", cutoff_length=8
    )
    assert answers(tokenizer, table).startswith(" is the answer")


def test_train_on_inputs_and_text_take_all_but_the_first_token():
    tokenizer = make_tokenizer(bos=True)
    for table, _ in (
        tokenize(tokenizer, QUESTION, train_on_inputs=True, cutoff_length=512),
        tokenize(tokenizer, {"text": "what is the answer"}, format="text"),
    ):
        assert table.targets.tolist() == [table.lengths[0] - 1]
        assert not table.example(0)[1][0] and table.example(0)[0][-1] == 2


def test_a_tokenizer_without_an_end_is_warned_of(caplog):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    table, _ = tokenize(tokenizer, QUESTION, template="plain")
    assert answers(tokenizer, table) == "the correct answer is option1"
    assert "no end-of-text token" in caplog.text


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer Slow is a slow one"):
        tokenize(Slow(), QUESTION)


def turn(role, content):
    return {"role": role, "content": content}


TURNS = [
    turn("system", "what"),
    turn("user", "what is this"),
    turn("assistant", "the answer"),
    turn("user", "to what question"),
    turn("assistant", "option1"),
]


def test_every_assistant_turn_is_an_answer():
    tokenizer = make_tokenizer(bos=True)
    text, spans = render_chat([*TURNS, turn("user", "left out")], tokenizer)
    assert [text[start:end] for start, end in spans] == ["the answer<eos>\n", "option1<eos>\n"]
    assert "left out" not in text
    table, _ = tokenize(tokenizer, {"messages": TURNS}, format="chat")
    tokens, _ = table.example(0)
    assert answers(tokenizer, table) == "the answer<eos>\noption1<eos>\n"
    assert tokens[0] == tokenizer.convert_tokens_to_ids("<|system|>")  # no start but the template's
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ messages | length }} turns" + CHAT_TEMPLATE,  # the start depends on what follows
        CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>think"),  # the invitation is not what is rendered later
        # Reasoning models: what an answer opens with is dropped once another turn follows.
        CHAT_TEMPLATE.replace(
            "{{ message.content }}",
            "{{ message.content[4:] if message.role == 'assistant' and not loop.last else message.content }}",
        ),
    ],
)
def test_a_template_that_cannot_be_split(chat_template):
    tokenizer = make_tokenizer(chat_template=chat_template)
    with pytest.raises(ValueError, match=r"file:1: .*cannot be split by turn"):
        tokenize(tokenizer, {"messages": TURNS}, format="chat", on_bad=lambda _: None)


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(ValueError, match="has no chat template"):
        tokenize(make_tokenizer(chat_template=None), {"messages": TURNS}, format="chat")


def test_a_record_that_the_template_refuses_is_a_bad_record():
    tokenizer = make_tokenizer(
        chat_template="{% if messages[0].role != 'user' %}{{ raise_exception('no system turns') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    with pytest.raises(RenderingError, match="no system turns"):
        render_chat(TURNS, tokenizer)
    bad: list[str] = []
    table, _ = tokenize(tokenizer, {"messages": TURNS}, {"messages": TURNS[1:]}, format="chat", on_bad=bad.append)
    assert len(table) == len(bad) == 1 and bad[0].startswith("file:1: ")


def test_progress_is_told():
    calls = []
    records = [(QUESTION, "")] * 600
    tokenize_records(records, recipe(), make_tokenizer(), fail, lambda *done: calls.append(done))
    assert calls[-1] == (600, 600) and len(calls) > 1
