"""What a user may ask for: frozen models with one docstring per key.

Everything here is checked before torch is imported. A key that is not listed is an error, a value of the
wrong type is an error, and rules that join several keys stand in the validators at the end of each model.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.adapter import DIAGONAL, INNER_BONDS, AdapterRecipe, check_ranks
from metatt_scale.recipe.records import ClassifierRecipe, DataRecipe, Labels, TaskName, TaskRecipe
from metatt_scale.recipe.scores import evaluation_keys, headline
from metatt_scale.recipe.section import PathText, Section
from metatt_scale.recipe.sweep import SweepRecipe
from metatt_scale.recipe.tasks import check_tasks


class BackboneRecipe(Section):
    """The frozen model that is adapted."""

    path: PathText = Field(min_length=1)
    """Hub id, local folder, `.gguf` file, `package:NAME` (a GGUF file, or a folder with config.json and safetensors,
    inside an installed Python package), or `random:ARCHITECTURE` (random weights of a shipped or given config JSON;
    for tests and measurements). Safetensors are loaded layer by layer; a GGUF file is unpacked whole in the host
    memory of every process."""
    revision: PathText | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the unquantised weights and of the computation."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How the weights of the linear layers are stored (bitsandbytes)."""
    double_quantization: bool = True
    """Quantise the 4-bit scales once more (saves about 0.4 bits per weight)."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "bfloat16"
    """Type under which packed 4-bit weights are stored. Sharding needs a float type equal to `dtype`."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention kernel; `auto` takes flash-attn where it is installed and the device has it, else SDPA."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass (non-reentrant): less memory, about a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile. The first steps take minutes; worth it for long runs on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that a hub repository ships. Off unless you have read that code."""


class TrainingRecipe(Section):
    """The optimisation."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the mixture."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps (the schedule ends there too); `epochs` decides when absent."""
    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimizer step over all ranks and micro-batches."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Examples that one rank sends through the model at once."""
    packing: Literal["auto"] | bool = "auto"
    """Put the examples of a micro-batch into one row without padding, each seeing itself alone. `auto` packs where
    the model is found to keep them apart, `true` insists on it, `false` pads them to the longest. Classifiers are
    padded."""
    learning_rate: float = Field(default=5e-4, gt=0, le=100)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    """Part of all steps in which the learning rate rises, from a rate above zero."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient of all cores to this 2-norm; 0 never clips."""
    eval_every: int | Literal["epoch", "never"] = "epoch"
    """Steps between evaluation losses."""
    save_every: int | Literal["epoch", "never"] = "epoch"
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept on disk; never fewer than two."""
    keep: Literal["last", "best"] = "last"
    """Which adapter the run ends with: the last, or that of the best evaluation (`best_by`)."""
    best_by: Literal["loss", "metric"] = "loss"
    """What makes an evaluation the best: the lowest loss, or the highest `classifier.metric`; with `tasks` the
    highest mean of theirs."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations that were not the best so far."""
    max_nonfinite_steps: int = Field(default=5, ge=1)
    """Stop after so many steps in a row whose loss or gradient is not finite (each is skipped and counted).
    Evaluations do not count; but values whose last evaluation has no finite loss are not handed over."""
    resume: Literal["auto", "exact", "never"] = "auto"
    """`auto` goes on from the newest valid checkpoint in `output_dir`; `exact` also refuses another number of ranks
    or threads and another device than the checkpoint's (the bits would differ), and takes deterministic kernels on
    CUDA, which are slower; `never` refuses a folder that has checkpoints."""

    def steps(self, per_epoch: int) -> int:
        """Return the number of optimizer steps of a run."""
        return self.max_steps or self.epochs * per_epoch

    @model_validator(mode="after")
    def _check(self) -> TrainingRecipe:
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"`{name}` is {value}; give a positive number of steps, `epoch` or `never`")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` is {self.betas}; both must be in [0, 1)")
        if self.eval_every == "never" and (self.keep == "best" or self.early_stopping_patience):
            raise ValueError(
                "`keep: best` and `early_stopping_patience` need evaluation losses but `eval_every` is `never`; "
                "set `eval_every: epoch`"
            )
        return self


class ParallelRecipe(Section):
    """How several processes share one job; one process needs none of it."""

    backbone: Literal["auto", "replicate", "fsdp2", "zero3"] = "auto"
    """Who holds the frozen backbone. `replicate`: every rank all of it. `fsdp2`, `zero3`: each rank a shard, gathered
    layer by layer. `auto` follows the launcher: `accelerate launch --use_fsdp` or `--use_deepspeed`, `deepspeed`;
    else `replicate`."""
    shard_size: int | Literal["world", "node"] = "world"
    """Ranks that hold one copy of the backbone among them (FSDP2): all, those of a node, or so many (hybrid
    sharding); every further group of as many holds a copy of its own."""
    reshard_after_forward: bool = True
    """Give a layer's gathered weights back after its forward and gather them again for its backward (FSDP2): less
    memory, half as many bytes more on the wire."""
    cpu_offload: bool = False
    """Keep the shards in host memory and copy each layer to the GPU when it is due (FSDP2; ZeRO-3 has
    ds_configs/zero3_offload_cpu.json)."""
    deepspeed_config: PathText | None = Field(default=None, min_length=1)
    """DeepSpeed JSON for `zero3` (see ds_configs/); values that are "auto" come from this recipe. That of the
    launcher, or plain ZeRO-3, when absent."""
    check_replicas_every: int = Field(default=100, ge=1)
    """Steps between comparisons of the cores and moments of all ranks by hash; a difference stops the run."""
    timeout_minutes: float = Field(default=10.0, ge=0.05, le=1440)
    """A rank that waits longer than this for the others gives up and takes the job down."""

    @model_validator(mode="after")
    def _check(self) -> ParallelRecipe:
        if isinstance(self.shard_size, int) and self.shard_size < 1:
            raise ValueError(f"`shard_size` is {self.shard_size}; give a number of ranks from 1, `world` or `node`")
        if self.deepspeed_config is not None and self.backbone in ("replicate", "fsdp2"):
            raise ValueError(
                f"`deepspeed_config` is set but `backbone` is {self.backbone}; set `backbone: zero3`, or leave it out"
            )
        if self.backbone != "auto" and (problem := self.foreign_to(self.backbone)):
            raise ValueError(problem)
        return self

    def foreign_to(self, strategy: str) -> str | None:
        """Return what is wrong where FSDP2's settings meet another strategy; None where nothing is."""
        given = self.model_dump(include={"shard_size", "reshard_after_forward", "cpu_offload"}, exclude_defaults=True)
        if strategy == "fsdp2" or not given:
            return None
        shown = " and ".join(f"parallel.{name} is {str(value).lower()}" for name, value in given.items())
        return (
            f"{shown}, a setting of fsdp2, but the backbone is {strategy}; leave it out, or set parallel.backbone: "
            "fsdp2 (for zero3 parallel.deepspeed_config has such settings)"
        )


class EvaluationRecipe(Section):
    """Scores after training."""

    tasks: tuple[PathText, ...] = ()
    """lm-evaluation-harness task names; with `data` they are read from local files (recipes/tasks)."""
    data: PathText | None = Field(default=None, min_length=1)
    """Folder of local task files (`TASK.jsonl` or `TASK.jsonl.gz`); the harness fetches from the hub when absent."""
    limit: int | None = Field(default=None, ge=1)
    """Questions per task; all when absent."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per forward."""


class LoggingRecipe(Section):
    """Where numbers go, besides metrics.jsonl."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers (through accelerate; each needs its package)."""
    project: str = "metatt_scale"
    """Project name given to the trackers."""


class Recipe(Section):
    """One fine-tuning run, from the model to the scores."""

    output_dir: PathText = Field(min_length=1)
    """Run directory: recipe.yaml, metrics.jsonl, checkpoints/, adapter/, results.json."""
    seed: int = Field(default=42, ge=0)
    """Seed of the initialisation, of the data order and of dropout."""
    backbone: BackboneRecipe
    adapter: AdapterRecipe = AdapterRecipe()
    classifier: ClassifierRecipe | None = None
    tasks: dict[TaskName, TaskRecipe] = Field(default={})
    """Tasks that are learnt together, in the order of their slices in a task core; every data source names one. The
    loss is the sum of theirs, each a mean over its own records of the batch. Names begin with a letter or digit and
    go on with letters, digits and _ . -"""
    data: DataRecipe
    training: TrainingRecipe = TrainingRecipe()
    sweep: SweepRecipe | None = None
    """Change the chain's ranks while it is trained; they stay as they are when absent."""
    parallel: ParallelRecipe = ParallelRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    logging: LoggingRecipe = LoggingRecipe()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training and benchmarks compute. `auto` takes a GPU where PyTorch can use one, and refuses a machine
    whose GPUs a PyTorch that is built for them cannot use; `cuda` insists on one, `cpu` leaves them alone."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        training, data = self.training, self.data
        wants_loss = training.keep == "best" or training.early_stopping_patience is not None
        if wants_loss and not (data.validation or data.validation_size):
            raise ValueError(
                "`training.keep: best` and `training.early_stopping_patience` need validation records; "
                "set `data.validation_size` or `data.validation`"
            )
        if self.classifier is None and training.best_by == "metric":
            raise ValueError(
                "`training.best_by` is metric, but there is no `classifier`, and a language model has only its loss "
                "while it trains; leave it out"
            )
        if self.classifier is None and data.format == "sentences":
            raise ValueError(
                "`data.format` is sentences, but there is no `classifier`; say how many classes the records have, "
                "for example `classifier: {labels: 2}` (1 for numbers), or choose another format"
            )
        if self.classifier is not None:
            self._check_classifier()
        check_tasks(self.tasks, data, self.classifier)
        if "p1d" in self.adapter.kind and not self.tasks:
            raise ValueError(
                f"`adapter.kind` is {self.adapter.kind}, whose middle core is for tasks, but there are no `tasks`; "
                "name them, or choose metatt_4d"
            )
        if self.sweep is not None:
            self._check_sweep(self.sweep)
        if self.adapter.kind == "head_only" and (self.classifier is None or self.classifier.head == "frozen"):
            raise ValueError(
                "`adapter.kind` is head_only, but there is no head to train; set `classifier.head: trained`"
            )
        if self.adapter.kind == "full":
            self._check_full()
        return self

    @property
    def label_sets(self) -> dict[str, Labels]:
        """The labels of every task of a classifier, by name (empty of the only one); none of another model."""
        if self.classifier is None:
            return {}
        return dict(self.tasks) if self.tasks else {"": self.classifier}

    @property
    def headline(self) -> str:
        """Key of the number in metrics.jsonl that stands for all of an evaluation's."""
        return headline(self.label_sets)

    @property
    def evaluation_keys(self) -> tuple[str, ...]:
        """Keys of all numbers of an evaluation in metrics.jsonl."""
        return evaluation_keys(self.label_sets, tuple(self.tasks))

    @property
    def head_outputs(self) -> int | None:
        """Outputs of a classifier's head, those of all tasks side by side; None of another model."""
        return sum(labels.labels or 0 for labels in self.label_sets.values()) or None

    def _check_full(self) -> None:
        backbone, parallel = self.backbone, self.parallel
        if backbone.quantization != "none" or backbone.dtype != "float32":
            raise ValueError(
                f"`adapter.kind` is full, whose weights train in fp32, but `backbone.quantization` is "
                f"{backbone.quantization} and `backbone.dtype` {backbone.dtype}; set them to none and float32, or "
                "train an adapter"
            )
        if parallel.backbone in ("fsdp2", "zero3"):
            raise ValueError(
                f"`adapter.kind` is full, but `parallel.backbone` is {parallel.backbone}, which shards a frozen "
                "backbone; set `parallel.backbone: replicate`, or train an adapter"
            )

    def _check_sweep(self, sweep: SweepRecipe) -> None:
        if self.adapter.kind in DIAGONAL or self.adapter.kind not in INNER_BONDS:
            raise ValueError(
                f"`sweep` changes the ranks of a tensor train, and cannot be applied to adapter.kind "
                f"{self.adapter.kind}; leave `sweep` out, or choose a metatt kind or lotr"
            )
        for i, point in enumerate(sweep.schedule):
            check_ranks(point.rank, self.adapter.kind, f"sweep.schedule.{i}.rank")
        if sweep.formula is not None and not isinstance(self.adapter.rank, int):
            raise ValueError("`sweep.formula` starts from one rank for all bonds; give `adapter.rank` as one number")
        training = self.training
        if sweep.unit == "step" and training.max_steps is not None:
            sweep.check_reach(training.max_steps, "`training.max_steps`")
        if sweep.unit == "epoch" and training.max_steps is None:
            sweep.check_reach(training.epochs, "`training.epochs`")

    def _check_classifier(self) -> None:
        if self.data.format != "sentences":
            raise ValueError(
                f"`classifier` needs records with a label, but `data.format` is {self.data.format}; set "
                "`data.format: sentences` and `data.text_fields`, or leave `classifier` out"
            )
        if self.training.packing is True:
            raise ValueError(
                "`training.packing` is true, but the examples of a `classifier` are padded; leave it out"
            )
        if self.parallel.backbone == "zero3":
            raise ValueError(
                "`parallel.backbone` is zero3, which does not gather a `classifier` yet; set fsdp2 or replicate"
            )
        if self.evaluation.tasks:
            raise ValueError(
                f"`evaluation.tasks` is {list(self.evaluation.tasks)}, questions to a language model, but there is a "
                "`classifier`; leave it out (a classifier is scored on the validation records)"
            )


def only_chains(recipe: Recipe, command: str) -> None:
    """Refuse a recipe of another adapter for what counts or times the cores of a chain.

    Raises:
        ValueError: it has one.
    """
    if recipe.adapter.kind not in INNER_BONDS:
        raise ValueError(
            f"`{command}` is for {', '.join(INNER_BONDS)}, but `adapter.kind` is {recipe.adapter.kind}; give a "
            "recipe of one of these"
        )


def only_language_models(recipe: Recipe, command: str) -> None:
    """Refuse a recipe with a classifier for what makes or weighs text.

    Raises:
        ValueError: it has one.
    """
    if recipe.classifier is not None:
        remedy = "give a recipe without one"
        if command == "evaluate":
            remedy = f"its scores are eval_loss, {recipe.headline} and others in metrics.jsonl"
        raise ValueError(f"`{command}` is for language models, but this recipe has a `classifier`; {remedy}")
