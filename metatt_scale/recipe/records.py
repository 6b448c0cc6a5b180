"""Sections of a recipe about records: where they are read, what is in them, the labels they may have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.section import PathText, Section

OF_CLASSES, OF_NUMBERS = ("accuracy", "f1", "matthews"), ("spearman", "pearson")
"""Scores of each kind of label; the first is the headline unless another is asked for."""

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""It becomes part of keys, and of commands that are shown."""

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


class Labels(Section):
    """The labels of one task: so many classes, or numbers."""

    labels: int | None = Field(default=None, ge=1, le=10_000)
    """Number of classes; 1 means regression, whose labels are numbers."""
    metric: Metric | None = None
    """The headline among the scores, by which `training.best_by: metric` chooses. Absent: accuracy of classes,
    Spearman's rank correlation of numbers."""

    @model_validator(mode="after")
    def _check_metric(self) -> Labels:
        if self.labels is not None and self.metric is not None and self.metric not in self.scores:
            kind = "numbers (`labels` is 1)" if self.is_regression else f"{self.labels} classes"
            raise ValueError(f"`metric` is {self.metric}, but {kind} are scored by {', '.join(self.scores)}")
        return self

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.labels == 1

    @property
    def headline(self) -> str:
        """The score that stands for all: `metric`, or the usual one."""
        return self.metric or self.scores[0]

    @property
    def scores(self) -> tuple[str, ...]:
        """All that an evaluation gives."""
        return OF_NUMBERS if self.is_regression else OF_CLASSES


class TaskRecipe(Labels):
    """One of several tasks that are learnt together. Of a language model nothing but its name is needed."""

    text_fields: tuple[str, ...] = ()
    """As `data.text_fields`, for the records of this task; those of `data` when absent."""
    label_field: str | None = Field(default=None, min_length=1)
    """As `data.label_field`, for the records of this task."""


class ClassifierRecipe(Labels):
    """Labels of whole records (`data.format: sentences`), on an encoder. Absent: a language model. With `tasks` the
    labels stand there, and each task has columns of its own in the head's last linear.
    """

    init_std: float | None = Field(default=None, gt=0, le=10)
    """Standard deviation of the head's random weights (what the files hold stays); the model's own, mostly 0.02, when
    absent. The head is frozen and what it reads is normalised, so this bounds every logit: too small, and nothing can
    be learnt."""
    init_bias: Literal["zero", "labels"] = "zero"
    """Where the bias of a random head starts. `labels`: at what the training labels are on average (the mean of
    numbers, the log of each class's share). From `zero` (paper) the adapter of a frozen head first learns to say that
    to every example alike, and the chain, whose cores all layers share, may take epochs to come back from there.
    What the files or `adapter.start_from` hold stays."""
    head: Literal["frozen", "trained"] = "frozen"
    """Keep the head at its start, random numbers that follow from `seed` (paper), or train it: in fp32 beside the
    adapter, on every rank."""


class DataSource(Section):
    """One place records are read from."""

    path: PathText = Field(min_length=1)
    """`.json`, `.jsonl`, either with `.gz`, a folder of such files, or a hub id."""
    subset: PathText | None = Field(default=None, min_length=1)
    """Configuration of a hub data set that has several, such as `mrpc` of nyu-mll/glue."""
    split: str = "train"
    """Split of a hub data set (ignored for files)."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Passes over this source per epoch: 1 takes each record once, 0.5 a fresh half each epoch, 2 each twice."""
    limit: int | None = Field(default=None, gt=0)
    """Use only so many records: the first, or see `draw`."""
    draw: Literal["first", "random"] = "first"
    """Which records `limit` takes. `random`: any, the same ones whatever the recipe's `seed`."""
    where: dict[str, str | int | bool] = Field(default={})
    """Use only records with these values in these fields, for example {source: boolq}. `true` is not 1, and text is
    no number; numbers are compared by value, so 1 is also 1.0 (JSON has one kind of number)."""
    task: str | None = None
    """Name of the task its records are of, one of `tasks`."""

    @model_validator(mode="after")
    def _check_draw(self) -> DataSource:
        if self.draw == "random" and self.limit is None:
            raise ValueError("`draw: random` says which records `limit` takes, but there is no `limit`; set it")
        return self

    @property
    def title(self) -> str:
        """What a reader is told that the records are."""
        return self.path if self.subset is None else f"{self.path} {self.subset}"


class SamplingRecipe(Section):
    """How much of an epoch each task gets (each source, where there are no tasks)."""

    strategy: Literal["proportional", "uniform", "temperature"] = "proportional"
    """`proportional`: what its sources hold. `uniform`: all the same. `temperature`: what they hold to the power of
    1 / temperature. An epoch stays as long as it is under `proportional`."""
    temperature: float = Field(default=2.0, ge=1, le=1000)
    """1 is proportional, infinity would be uniform."""
    cap: int | None = Field(default=None, ge=1)
    """At most so many examples of one task in an epoch, others in each."""

    @model_validator(mode="after")
    def _check(self) -> SamplingRecipe:
        if self.temperature != 2.0 and self.strategy != "temperature":
            raise ValueError(
                f"`temperature` is {self.temperature}, but `strategy` is {self.strategy}; set `strategy: "
                "temperature`, or leave it out"
            )
        return self


class DataRecipe(Section):
    """Records, how they become text, and how the text is cut."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """Sources of training records."""
    validation: tuple[DataSource, ...] = ()
    """Sources of validation records, for the evaluation loss."""
    sampling: SamplingRecipe = SamplingRecipe()
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
    cache_dir: PathText | None = Field(default=None, min_length=1)
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

    def of_task(self, task: TaskRecipe) -> DataRecipe:
        """Return the same with the fields of one task."""
        texts, label = task.text_fields or self.text_fields, task.label_field or self.label_field
        if self.format == "sentences":
            check_fields(texts, label)
        return self.model_copy(update={"text_fields": texts, "label_field": label})

    def _check_sentences(self) -> None:
        if self.text_fields:  # or each task has its own
            check_fields(self.text_fields, self.label_field)
        if self.train_on_inputs:
            raise ValueError("`train_on_inputs` is true, but the loss of `format: sentences` is that of labels")


def check_fields(texts: tuple[str, ...], label: str) -> None:
    """Refuse fields of `format: sentences` that cannot be meant.

    Raises:
        ValueError: not one or two, or the same twice.
    """
    if len(texts) not in (1, 2) or not all(texts):
        raise ValueError(
            f"`format` is sentences, but `text_fields` is {list(texts)}; name one field or two, for example "
            "[sentence1, sentence2]"
        )
    if len({*texts, label}) != len(texts) + 1:
        raise ValueError(f"`text_fields` is {list(texts)} and `label_field` {label}; name different fields")
