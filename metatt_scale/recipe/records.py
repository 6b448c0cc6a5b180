"""Sections of a recipe about records: where they are read, what is in them, the labels they may have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.section import Section as _Section

OF_CLASSES, OF_NUMBERS = ("accuracy", "f1", "matthews"), ("spearman", "pearson")
"""Scores of each kind of label; the first is the headline unless another is asked for."""


class ClassifierRecipe(_Section):
    """Labels of whole records (`data.format: sentences`), on an encoder. Absent: a language model."""

    labels: int = Field(ge=1, le=10_000)
    """Number of classes; 1 means regression, whose labels are numbers. The head stays frozen at a random start, which
    follows from `seed`."""
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"] | None = None
    """The headline among the scores, by which `training.best_by: metric` chooses. Absent: accuracy of classes,
    Spearman's rank correlation of numbers."""

    init_std: float | None = Field(default=None, gt=0, le=10)
    """Standard deviation of the head's random weights (what the files hold stays); the model's own, mostly 0.02, when
    absent. The head is frozen and what it reads is normalised, so this bounds every logit: too small, and nothing can
    be learnt."""

    @model_validator(mode="after")
    def _check(self) -> ClassifierRecipe:
        if self.metric is not None and self.metric not in self._scores:
            kind = "numbers (`labels` is 1)" if self.is_regression else f"{self.labels} classes"
            raise ValueError(f"`metric` is {self.metric}, but {kind} are scored by {', '.join(self._scores)}")
        return self

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.labels == 1

    @property
    def headline(self) -> str:
        """The score that stands for all: `metric`, or the usual one."""
        return self.metric or self._scores[0]

    @property
    def _scores(self) -> tuple[str, ...]:
        return OF_NUMBERS if self.is_regression else OF_CLASSES


class DataSource(_Section):
    """One place records are read from."""

    path: str = Field(min_length=1)
    """`.json`, `.jsonl`, either with `.gz`, a folder of such files, or a hub id."""
    subset: str | None = Field(default=None, min_length=1)
    """Configuration of a hub data set that has several, such as `mrpc` of nyu-mll/glue."""
    split: str = "train"
    """Split of a hub data set (ignored for files)."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Passes over this source per epoch: 1 takes each record once, 0.5 a fresh half each epoch, 2 each twice."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first so many records."""

    @property
    def title(self) -> str:
        """What a reader is told that the records are."""
        return self.path if self.subset is None else f"{self.path} {self.subset}"


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
    `text`: {text}. `sentences`: the fields of `text_fields`, with a label in `label_field`."""
    text_fields: tuple[str, ...] = ()
    """Fields that hold the sentence, or the two of a pair (`format: sentences`)."""
    label_field: str = Field(default="label", min_length=1)
    """Field that holds the label of a record: its class, a whole number from 0, or with `classifier.labels: 1` any
    number (`format: sentences`)."""
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
            raise ValueError("`train_on_inputs` is true, but the loss of `format: sentences` is that of labels")
