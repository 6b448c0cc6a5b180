"""From a record to one text, and where in it the answers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from metatt_scale.data.records import Format, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Template = Literal["llm_adapters", "plain"]

# The prompts of LLM-Adapters (Hu et al. 2023, `generate_prompt` in finetune.py) to the blank: published
# commonsense results were trained on the indentation of the Python source and on its stray trailing blanks
# (one with an input, two without).
_INDENT = 16 * " "
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
    f"{_INDENT}### Input:\n{_INDENT}{{input}}\n{_INDENT}\n"
    f"{_INDENT}### Response:\n{_INDENT}"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
    f"{_INDENT}### Response:\n{_INDENT}"
)


class Rendered(NamedTuple):
    """A text and the half-open character spans of its answers, in order and disjoint."""

    text: str
    answers: list[tuple[int, int]]


class RenderingError(ValueError):
    """A chat record that the tokenizer's template refuses (for example two user turns in a row)."""


def llm_adapters_prompt(instruction: str, input: str | None = None) -> str:
    """Return the prompt of LLM-Adapters up to where the answer starts.

    It ends in blanks. Tokenise prompt and answer together: the last blank usually joins the answer's first word.
    """
    if input:
        return _WITH_INPUT.format(instruction=instruction, input=input)
    return _WITHOUT_INPUT.format(instruction=instruction)


def plain_prompt(instruction: str, input: str | None = None) -> str:
    """Return instruction and input as they are, one after the other."""
    return instruction + (input or "")


def render(record: Record, format: Format, template: Template, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Turn a checked record into text with answer spans.

    Raises:
        RenderingError: the chat template refuses this record.
        ValueError: the tokenizer has no chat template, or one that cannot be split by turn.
    """
    match format:
        case "instruction":
            prompt = llm_adapters_prompt if template == "llm_adapters" else plain_prompt
            before = prompt(record["instruction"], record.get("input"))
            text = before + record["output"]
            return Rendered(text, [(len(before), len(text))])
        case "chat":
            return render_chat(record["messages"], tokenizer)
        case "text":
            return Rendered(record["text"], [(0, len(record["text"]))])
        case "sentences":
            raise AssertionError("data/sentences.py tokenises these")


def render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Render a conversation up to its last assistant turn; the answers are what the assistant turns add.

    An answer is what the template adds between "the assistant is to speak" and "the assistant has spoken",
    so its closing token is part of it.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "`data.format` is chat but the tokenizer has no chat template; take an instruction-tuned model's "
            "tokenizer, or turn the records into the instruction format"
        )
    spoken = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    text = _render_turns(messages[: spoken[-1] + 1], tokenizer, to_speak=False)
    answers = []
    for i in spoken:
        before = _render_turns(messages[:i], tokenizer, to_speak=True)
        after = text if i == spoken[-1] else _render_turns(messages[: i + 1], tokenizer, to_speak=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the tokenizer's chat template cannot be split by turn: with the assistant's turn {i + 1} the text "
                "before it changes, so answers cannot be told from prompts; use another `chat_template`, or set "
                "`data.format: instruction`"
            )
        answers.append((len(before), len(after)))
    return Rendered(text, answers)


def _render_turns(turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, *, to_speak: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=to_speak)
    except Exception as error:  # the template is a program from the model's files, which may raise anything
        raise RenderingError(f"the tokenizer's chat template refuses the record ({error})") from error
    assert isinstance(text, str)
    return text
