"""The training loops of `--table end_to_end`: ours, transformers' Trainer, TRL's SFTTrainer, on the same records."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metatt_scale.adapter import inject
from metatt_scale.benchmark.arms import put_lora
from metatt_scale.benchmark.turns import Pause
from metatt_scale.data import IGNORE, BatchOrder, PreparedData, TokenTable
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe
from metatt_scale.training.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every loop is given."""

    recipe: Recipe
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    block_steps: int
    """Optimizer steps between pauses."""
    folder: Path
    """For what loops write; thrown away."""

    @property
    def pad_token_id(self) -> int:
        """The id that fills batches up; behind right padding any serves."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One loop, ready to run."""

    name: str
    trained: int
    """Trained values."""
    loop: Callable[[Pause], None]
    tokens: Callable[[int, int], int]
    """Real tokens (no padding) of the optimizer steps from the first number up to the second."""


@dataclass(kw_only=True)
class _PausingTrainer(Trainer):
    """Our loop; where it would see to checkpoints, it pauses."""

    block_steps: int
    pause: Pause

    def _save_if_due(self) -> None:
        if self.progress.step % self.block_steps == 0 and self.pause():
            self.progress.finished = True


def ours(model: PreTrainedModel, job: Job) -> Contestant:
    """Return the toolkit's loop with the recipe's own adapter."""
    recipe, world = job.recipe, World(device=job.device)
    adapter = inject(model, recipe.adapter, recipe.seed, job.device)
    settings: dict[str, Any] = {"recipe": recipe, "model": model, "adapter": adapter, "data": job.data}
    settings |= {"inputs": "benchmark", "pad_token_id": job.pad_token_id, "world": world, "folder": job.folder}
    settings |= {"console": Console(quiet=True), "block_steps": job.block_steps}
    order = BatchOrder(job.data.train, recipe.seed, recipe.training.batch_size)

    def tokens(first: int, last: int) -> int:
        steps = (order.global_batch(step)[1] for step in range(first, last))
        return sum(int(job.data.table.lengths[indices].sum()) for indices in steps)

    ranks = ",".join(map(str, dict.fromkeys(adapter.spec.ranks)))
    return Contestant(
        name=f"{recipe.adapter.kind} r={ranks}, metatt-scale",
        trained=adapter.spec.n_parameters,
        loop=lambda pause: _PausingTrainer(**settings, pause=pause).train(),
        tokens=tokens,
    )


def peft_trainer(model: PreTrainedModel, job: Job, rank: int) -> Contestant:
    """Return PEFT LoRA under transformers' Trainer: dynamic padding, grouped by length, mixed precision."""
    from transformers import Trainer as TransformersTrainer
    from transformers import TrainingArguments

    adapted = put_lora(model, job.recipe, rank)
    counting = _Counting(lambda examples: pad_right(examples, job.pad_token_id))
    arguments = TrainingArguments(**_arguments(job), train_sampling_strategy="group_by_length")
    dataset = as_dataset(job)
    trainer = TransformersTrainer(model=adapted, args=arguments, train_dataset=dataset, data_collator=counting)
    return _contestant(f"LoRA r={rank}, transformers Trainer", trainer, counting, job)


def trl_trainer(model: PreTrainedModel, job: Job, rank: int) -> Contestant:
    """Return PEFT LoRA under TRL's SFTTrainer with packing; to be called only where `has_trl`."""
    trl: Any = importlib.import_module("trl")
    adapted = put_lora(model, job.recipe, rank)
    # Rows without padding keep examples apart only under flash attention; elsewhere full rows of text are fastest.
    flash = str(model.config._attn_implementation).startswith("flash_attention")
    settings = _arguments(job) | {"packing": True, "packing_strategy": "bfd" if flash else "wrapped"}
    settings["max_length"] = job.recipe.data.cutoff_length
    settings["gradient_checkpointing"] = False  # the model has it switched on where the recipe asks for it
    dataset, tokenizer = as_dataset(job).remove_columns("length"), job.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL uses names that transformers is about to drop
        arguments = trl.SFTConfig(**settings)
        trainer = trl.SFTTrainer(model=adapted, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    counting = trainer.data_collator = _Counting(trainer.data_collator)
    return _contestant(f"LoRA r={rank}, TRL packing", trainer, counting, job)


def has_trl() -> bool:
    """Whether TRL is installed."""
    return importlib.util.find_spec("trl") is not None


def as_dataset(job: Job) -> Any:
    """Return one epoch's examples of our token table as a `datasets.Dataset`: input_ids, labels, length."""
    import pyarrow
    from datasets import Dataset

    table: TokenTable = job.data.table
    labels = np.where(table.flags, table.tokens, np.int32(IGNORE))
    offsets = pyarrow.array(table.offsets)
    columns = {
        name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(np.ascontiguousarray(values)))
        for name, values in (("input_ids", table.tokens), ("labels", labels))
    }
    whole = pyarrow.table({**columns, "length": pyarrow.array(table.lengths)})
    return Dataset(whole.take(pyarrow.array(job.data.train.epoch_order(job.recipe.seed, 0))))


def pad_right(examples: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest of them."""
    shape = (len(examples), max(len(example["input_ids"]) for example in examples))
    batch = {"input_ids": np.full(shape, pad_token_id), "labels": np.full(shape, IGNORE)}
    batch["attention_mask"] = np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        for name in ("input_ids", "labels"):
            batch[name][row, :length] = example[name]
        batch["attention_mask"][row, :length] = 1
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class _Counting:
    """A collator that remembers how many real tokens each of its batches has, in the order of their use."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self.counts: list[int] = []

    def __call__(self, examples: Any) -> Any:
        batch = self._collate(examples)
        mask = batch.get("attention_mask")
        self.counts.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
        return batch


def _contestant(name: str, trainer: Any, counting: _Counting, job: Job) -> Contestant:
    from transformers import PrinterCallback, TrainerCallback

    batches_until = [0]  # optimizer steps -> batches used; the last step of an epoch may have fewer than others

    class Pausing(TrainerCallback):
        def __init__(self, pause: Pause) -> None:
            self.pause, self.batches = pause, 0

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.batches += 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.batches += 1
            batches_until.append(self.batches)
            if state.global_step % job.block_steps == 0 and self.pause():
                control.should_training_stop = True

    def loop(pause: Pause) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Pausing(pause))
        trainer.train()

    def tokens(first: int, last: int) -> int:
        return sum(counting.counts[batches_until[first] : batches_until[last]])

    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return Contestant(name=name, trained=trained, loop=loop, tokens=tokens)


def _arguments(job: Job) -> dict[str, Any]:
    """Return what both foreign trainers are told: the recipe's optimisation, and nothing written or reported."""
    training, on_cpu = job.recipe.training, job.device.type == "cpu"
    assert training.max_steps is not None
    at_once = micro_batch(training.batch_size, training.micro_batch_size)
    return {
        "output_dir": str(job.folder),
        "max_steps": training.max_steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": training.batch_size // at_once,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": math.ceil(training.warmup_ratio * training.max_steps),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_epsilon": training.eps,
        "max_grad_norm": training.max_grad_norm,
        "seed": job.recipe.seed,
        "use_cpu": on_cpu,
        "bf16": job.recipe.backbone.dtype == "bfloat16",
        "fp16": job.recipe.backbone.dtype == "float16" and not on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": job.recipe.logging.every,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def micro_batch(batch_size: int, largest: int) -> int:
    """Return the largest divisor of a batch that is not above `largest`, so that every step has the whole batch."""
    return next(size for size in range(min(batch_size, largest), 0, -1) if batch_size % size == 0)
