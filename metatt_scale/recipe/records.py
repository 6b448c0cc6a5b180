"""Sections of a recipe about records: where they are read, what is in them, the classes they may have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.section import Section as _Section


class ClassifierRecipe(_Section):
    """Classes of whole records (`data.format: sentences`), on an encoder. Absent: a language model."""

    labels: int = Field(ge=2, le=10_000)
    """Number of classes. The head that tells them apart starts at random numbers, which follow from `seed`."""
    head: Literal["frozen", "trained"] = "frozen"
    """Keep the head at its start (paper), or train it: in fp32 beside the adapter, on every rank."""


class DataSource(_Section):
    """One place records are read from."""

    path: str = Field(min_length=1)
    """`.json`, `.jsonl`, either with `.gz`, a folder of such files, or a hub id."""
    split: str = "train"
    """Split of a hub data set (ignored for files)."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Passes over this source per epoch: 1 takes each record once, 0.5 a fresh half each epoch, 2 each twice."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first so many records."""


class DataRecipe(_Section):
    """Records, how they become text, and how the text is cut."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """Sources of training records."""
    validation: tuple[DataSource, ...] = ()
    """Sources of validation records, for the evaluation loss."""
    validation_size: int = Field(default=0, ge=0)
    """Records split off the training sources for validation (a pure function of the seed)."""
    format: Literal["instruction", "chat", "text", "sentences"] = "instruction"
    """`instruction`: {instruction, input, output}. `chat`: {messages} through the tokenizer's template.
    `text`: {text}. `sentences`: the fields of `text_fields`, with a class in `label_field`."""
    text_fields: tuple[str, ...] = ()
    """Fields that hold the sentence, or the two of a pair (`format: sentences`)."""
    label_field: str = Field(default="label", min_length=1)
    """Field that holds the class of a record, a whole number from 0 (`format: sentences`)."""
    template: Literal["llm_adapters", "plain"] = "llm_adapters"
    """Prompt of instruction records: that of LLM-Adapters (Hu et al. 2023), or instruction and input as they are."""
    cutoff_length: int = Field(default=256, ge=8)
    """Longest sequence in tokens; what is beyond is cut off."""
    train_on_inputs: bool = False
    """Take the loss on prompts as well, not on answers only."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be read stops the run with file and line, or is skipped and counted."""
    cache_dir: str | None = Field(default=None, min_length=1)
    """Folder of tokenised data; the user's cache folder when absent."""

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        if self.validation and self.validation_size:
            raise ValueError(
                "`validation` and `validation_size` exclude each other; name validation files or split some off"
            )
        if self.format == "sentences":
            self._check_sentences()
        elif self.text_fields:
            raise ValueError(
                f"`text_fields` is {list(self.text_fields)}, which only `format: sentences` reads, but `format` is "
                f"{self.format}; leave it out, or set `format: sentences`"
            )
        return self

    def _check_sentences(self) -> None:
        fields = self.text_fields
        if len(fields) not in (1, 2) or not all(fields):
            raise ValueError(
                f"`format` is sentences, but `text_fields` is {list(fields)}; name one field or two, for example "
                "[sentence1, sentence2]"
            )
        if len({*fields, self.label_field}) != len(fields) + 1:
            raise ValueError(
                f"`text_fields` is {list(fields)} and `label_field` {self.label_field}; name different fields"
            )
        if self.train_on_inputs:
            raise ValueError("`train_on_inputs` is true, but the loss of `format: sentences` is that of classes")
