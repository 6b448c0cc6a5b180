"""From text to tokens: which ids, and which of them are to be learned.

Shape letters: T tokens of all examples, E examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from metatt_scale.data.records import Record
from metatt_scale.data.sources import OnBad
from metatt_scale.data.templates import Rendered, RenderingError, render
from metatt_scale.recipe import DataRecipe
from metatt_scale.strict_json import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int, int], None]
"""Called with (records done, records in all) of the source at work."""

logger = logging.getLogger(__name__)
CHUNK = 512
"""Records per call of the tokenizer, which spreads them over its threads."""
_ARRAYS = ("tokens", "flags", "offsets", "segments", "classes", "values", "tasks")
IGNORE = -100
"""Label of what is not predicted (the convention of torch's cross entropy)."""
_NOTHING = {"classes": np.int32(IGNORE), "values": np.float32(np.nan)}


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Examples as one flat array of tokens, cut at `offsets`; read-only and often mapped from a file."""

    tokens: NDArray[np.int32]
    """(T,) token ids."""
    flags: NDArray[np.uint8]
    """(T,) 1 where the token is to be predicted; never at the first position of an example."""
    offsets: NDArray[np.int64]
    """(E + 1,) example i is tokens[offsets[i]:offsets[i + 1]]."""
    segments: NDArray[np.uint8] | None = None
    """(T,) 1 where a token is of the second sentence of a pair; of labelled records only."""
    classes: NDArray[np.int32] | None = None
    """(E,) class of each example; of records with classes only."""
    values: NDArray[np.float32] | None = None
    """(E,) number of each example; of records with numbers only."""
    tasks: NDArray[np.int16] | None = None
    """(E,) task of each example, where there are several."""

    @property
    def labelled(self) -> bool:
        """Whether each example has a class or a number, and no tokens to be predicted."""
        return self.segments is not None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return by name what there is of the above."""
        return {name: array for name in _ARRAYS if (array := getattr(self, name)) is not None}

    def is_whole(self) -> bool:
        """Return whether the arrays fit each other: one value a token or an example, examples end to end."""
        per_token, per_example = (len(self.tokens),), (len(self.offsets) - 1,)
        shapes = {"tokens": per_token, "flags": per_token, "segments": per_token, "offsets": (len(self.offsets),)}
        if any(array.shape != shapes.get(name, per_example) for name, array in self.arrays().items()):
            return False
        ends = len(self.offsets) and (int(self.offsets[0]), int(self.offsets[-1])) == (0, len(self.tokens))
        return bool(ends) and bool((self.lengths >= 0).all()) and not (len(self.tokens) and self.tokens.min() < 0)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) tokens per example."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """(E,) tokens to be predicted per example."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.flags, self.offsets[:-1], dtype=np.int64)

    def example(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return copies of the (length,) token ids and target flags of example i."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part].astype(np.int64), self.flags[part].astype(np.bool_)


def concatenate(tables: Sequence[TokenTable]) -> TokenTable:
    """Join tables end to end; a single table is returned as it is, without a copy."""
    if len(tables) == 1:
        return tables[0]
    starts = np.cumsum([0] + [len(table.tokens) for table in tables])
    ends = [table.offsets[1:] + start for table, start in zip(tables, starts, strict=False)]
    names = dict.fromkeys(name for table in tables for name in table.arrays())
    joined = {name: np.concatenate([_array(table, name) for table in tables]) for name in names}
    return TokenTable(**{**joined, "offsets": np.concatenate([np.zeros(1, np.int64), *ends])})


def _array(table: TokenTable, name: str) -> NDArray[Any]:
    """Return an array of a table, or labels that say nothing: tasks with classes stand beside tasks with numbers."""
    array = getattr(table, name)
    return np.full(len(table), _NOTHING[name]) if array is None else array


def tokenize_records(
    records: Sequence[tuple[Record, str]],
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    on_bad: OnBad,
    progress: Progress | None = None,
) -> tuple[TokenTable, dict[str, int]]:
    """Tokenise records as the recipe says.

    Returns the table and its counts: `examples`, `truncated` (cut at `cutoff_length`), `dropped` (nothing left
    to predict after the cut), `tokens` and `targets`.

    Raises:
        ValueError: the tokenizer cannot tell characters from tokens, or has no usable chat template.
    """
    check_fast(tokenizer)
    eos = tokenizer.eos_token_id if recipe.format != "chat" else None  # chat templates close their turns
    if eos is None and recipe.format != "chat":
        logger.warning("the tokenizer has no end-of-text token: the model will not learn where answers end")
    tokens: list[NDArray[np.int32]] = []
    flags: list[NDArray[np.uint8]] = []
    truncated = dropped = 0
    for start in range(0, len(records), CHUNK):
        chunk = _render_all(records[start : start + CHUNK], recipe, tokenizer, on_bad)
        for ids, targets, cut in _encode(chunk, recipe, tokenizer, cast("int | None", eos)):
            truncated += cut
            if targets.any():
                tokens.append(ids)
                flags.append(targets.astype(np.uint8))
            else:
                dropped += 1
        if progress is not None:
            progress(min(start + CHUNK, len(records)), len(records))
    table = _flatten(tokens, flags)
    counts = {
        "examples": len(table),
        "truncated": truncated,
        "dropped": dropped,
        "tokens": len(table.tokens),
        "targets": int(table.targets.sum()),
    }
    return table, counts


def check_fast(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that does not say where its tokens come from."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one, which does not tell the characters of a token; "
            "use a fast tokenizer (one with a tokenizer.json)"
        )


def _flatten(tokens: Sequence[NDArray[np.int32]], flags: Sequence[NDArray[np.uint8]]) -> TokenTable:
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
    # The empty arrays in front let a source without a single example through, to be named as an error above.
    return TokenTable(
        np.concatenate([np.zeros(0, np.int32), *tokens]), np.concatenate([np.zeros(0, np.uint8), *flags]), offsets
    )


def answer_tokens(offsets: NDArray[np.int64], answers: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Tell which tokens show a character of an answer.

    Args:
        offsets: (T, 2) first and last + 1 character of each token; (0, 0) for tokens that the tokenizer added.
        answers: half-open character spans.

    Returns:
        (T,) flags. A token that holds the prompt's last blank and the answer's first word is an answer token:
        the text is tokenised whole, as at inference, and no boundary is forced between prompt and answer.
    """
    first, last = offsets[:, 0], offsets[:, 1]
    flags = np.zeros(len(offsets), np.bool_)
    for start, end in answers:
        # Byte-level tokenizers trim blanks off their offsets, which leaves a token of blanks as (e, e), where e is
        # its end: it lies before e, so it belongs to the span that holds or closes at e.
        inside = (first < end) | ((first == last) & (last <= end))
        flags |= inside & (last > start)
    return flags


def _render_all(
    records: Sequence[tuple[Record, str]], recipe: DataRecipe, tokenizer: PreTrainedTokenizerFast, on_bad: OnBad
) -> list[Rendered]:
    rendered = []
    for record, place in records:
        try:
            text = render(record, recipe.format, recipe.template, tokenizer)
            if not is_unicode(text.text):  # from a field that only the chat template knows
                raise RenderingError("the text of the record has an unpaired surrogate, which is not valid Unicode")
            rendered.append(text)
        except RenderingError as error:
            on_bad(f"{place}: {error}")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return rendered


def _encode(
    rendered: Sequence[Rendered], recipe: DataRecipe, tokenizer: PreTrainedTokenizerFast, eos: int | None
) -> list[tuple[NDArray[np.int32], NDArray[np.bool_], bool]]:
    """Return (ids, targets, was cut) per text."""
    if not rendered:
        return []
    encoded = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=recipe.format != "chat",
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,  # cut below, always on the right and knowing whether it happened
        verbose=False,
    )
    examples = []
    for (_, answers), ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids = np.asarray(ids, np.int32)
        targets = answer_tokens(np.asarray(offsets, np.int64).reshape(-1, 2), answers)
        cut = len(ids) > recipe.cutoff_length
        if cut:
            ids, targets = ids[: recipe.cutoff_length], targets[: recipe.cutoff_length]
        elif eos is not None and len(ids) and ids[-1] == eos:
            targets[-1] = True
        elif eos is not None and len(ids) < recipe.cutoff_length:
            ids, targets = np.append(ids, np.int32(eos)), np.append(targets, True)
        if recipe.train_on_inputs:
            targets[:] = True
        targets[:1] = False  # nothing comes before the first token to predict it from
        examples.append((ids, targets, cut))
    return examples
