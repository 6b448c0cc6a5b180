"""From a recipe to a trained adapter in its run directory."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metatt_scale import __version__
from metatt_scale.adapter import Adapter, save_adapter, set_head
from metatt_scale.backbone import (
    check_unchanged,
    compile_layers,
    head_tensors,
    identity,
    identity_by_ends,
    load_backbone,
    load_tokenizer,
)
from metatt_scale.data import PreparedData, prepare
from metatt_scale.determinism import deterministic_kernels, kernels_of
from metatt_scale.files import new_folder, write_text
from metatt_scale.hardware import pick_device
from metatt_scale.methods import build_adapter, known_tasks
from metatt_scale.parallel import (
    Launch,
    Message,
    World,
    check_engine,
    check_same,
    join,
    make_engine,
    place_in_world,
    read_launch,
)
from metatt_scale.paths import user_path
from metatt_scale.recipe import Recipe, dump_recipe
from metatt_scale.training import checkpoint
from metatt_scale.training.checkpoint import Snapshot
from metatt_scale.training.checks import (
    RECIPE_FILE,
    RECIPE_HEAD,
    check_folder,
    check_length,
    check_result,
    check_scores,
    check_trainable,
    check_writable,
    only_run,
)
from metatt_scale.training.classifier import head_start
from metatt_scale.training.loop import Trainer
from metatt_scale.training.metrics import check_trackers


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What `train` leaves in memory beside the files in the run directory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    folder: Path
    weights: str
    """Identity of the backbone's weights, as they were loaded."""


def train(recipe: Recipe, console: Console) -> TrainedRun:
    """Run a recipe: load, adapt, train (or go on where a killed run stopped), write `adapter/`.

    Every rank of the job calls this; the first one prints, decides and writes.

    Raises:
        ValueError: anything the user can mend, in one message.
        TrainingStopped: a signal arrived and the state is saved.
        OtherRankError: rank 0 failed and tells why.
    """
    folder = user_path(recipe.output_dir, "output_dir")
    launch, place = read_launch(recipe.parallel), place_in_world()
    device = pick_device(recipe.device, console, recipe.backbone.dtype)
    check_engine(launch, recipe, size=place.size, local_size=place.local_size, device=device)
    with contextlib.ExitStack() as stack:
        if recipe.training.resume == "exact":
            stack.enter_context(deterministic_kernels(device))
        if place.rank == 0:
            check_writable(folder)
            check_trackers(recipe)
            stack.enter_context(only_run(folder))
            check_folder(folder, recipe)
        if launch.note:
            console.print(launch.note, style="yellow", highlight=False, soft_wrap=True)
        tokenizer = load_tokenizer(recipe.backbone)
        # Before the ranks meet: both may take long, and a rank that waits in a collective gives up some time.
        data = _prepare(recipe, tokenizer, console)
        weights = identity(recipe.backbone, lambda text: console.print(text, highlight=False, soft_wrap=True))
        check_length(recipe, data)
        check_scores(recipe, data)
        timeout = timedelta(minutes=recipe.parallel.timeout_minutes)
        sharded, offload = launch.strategy != "replicate", recipe.parallel.cpu_offload
        with join(device, timeout, group=sharded, cpu_tensors=offload) as world:
            trainer = _assemble(recipe, folder, console, world, launch, data, tokenizer, weights)
            _resume(trainer)
            world.on_first(lambda: write_text(folder / RECIPE_FILE, RECIPE_HEAD + dump_recipe(recipe)))
            trainer.train()
            is_best = recipe.training.keep == "best" and _take_best(trainer)
            check_result(trainer.adapter, trainer.progress, is_best=is_best)
            world.on_first(lambda: _write_adapter(folder / "adapter", trainer))
    console.print(f"adapter: {folder / 'adapter'}", highlight=False, soft_wrap=True)
    return TrainedRun(
        model=trainer.model, tokenizer=tokenizer, adapter=trainer.adapter, folder=folder, weights=weights
    )


def _prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> PreparedData:
    with console.status("tokenising") as status:

        def show(done: int, total: int) -> None:
            status.update(f"tokenising {done:,} of {total:,} records")

        classes = recipe.classifier.labels if recipe.classifier else None
        data = prepare(recipe.data, tokenizer, recipe.seed, show, classes, recipe.tasks)  # type: ignore[arg-type]
    _report_data(data.counts, console)
    return data


def _assemble(
    recipe: Recipe,
    folder: Path,
    console: Console,
    world: World,
    launch: Launch,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
) -> Trainer:
    """Load the backbone, put the chain behind it, and build the trainer."""
    _check_agreement(world, recipe, data, weights)
    with console.status("loading the backbone"):
        engine = make_engine(world, launch, recipe)
        model = load_backbone(
            recipe.backbone, world.device, recipe.seed, engine, recipe.head_outputs, head_start(recipe, data)
        )
    check_unchanged(recipe.backbone, weights)
    check_trainable(model, data)
    resumes, _ = world.from_first(lambda: (bool(checkpoint.list_checkpoints(folder / "checkpoints")), {}))
    adapter = build_adapter(model, recipe, world, engine, resumes=bool(resumes))
    frozen_head = recipe.classifier is not None and recipe.classifier.head == "frozen"
    _report_adapter(adapter, console)
    if world.size > 1:
        console.print(f"{world.size} ranks, backbone: {launch.strategy}", highlight=False)
    trainer = Trainer(
        recipe=recipe,
        model=model,
        adapter=adapter,
        data=data,
        inputs=_inputs(data, weights),
        weights=weights,
        pad_token_id=_pad_id(tokenizer),
        head=head_tensors(model) if frozen_head else {},
        world=world,
        folder=folder,
        console=console,
    )
    trainer.progress.tasks_before = [] if resumes else list(known_tasks(recipe))
    if recipe.backbone.compile:
        compile_layers(model)  # not before: the trainer tries the model, on inputs that are not worth a compilation
    return trainer


def _inputs(data: PreparedData, weights: str) -> str:
    return hashlib.sha256(f"{data.digest} {weights}".encode()).hexdigest()


def _check_agreement(world: World, recipe: Recipe, data: PreparedData, weights: str) -> None:
    """Refuse ranks that would not do the same work, before any of it is done."""
    things = {
        "the recipe": recipe.model_dump_json(),
        "the training data": data.digest,
        "the backbone's weights": weights,
        "versions": f"{__version__} {torch.__version__} {transformers.__version__}",
    }
    check_same(world, things, "give every node the same recipe, overrides, files and package versions")


def _resume(trainer: Trainer) -> None:
    """Continue from the newest valid checkpoint where there is one and the recipe allows it; rank 0 reads it."""
    root = trainer.folder / "checkpoints"

    def read() -> Message:
        path, snapshot, damaged = checkpoint.newest_valid(root, trainer.recipe, trainer.expected())
        for message in damaged:
            _warn(trainer.console, f"skipped a damaged checkpoint: {message}")
        if snapshot is None:
            if damaged:
                raise ValueError(
                    f"{root}: none of the {len(damaged)} checkpoints is intact ({damaged[0]}); nothing was changed. "
                    "Choose another output_dir to start afresh"
                )
            return None, {}
        _check_origin(trainer, f"{path}", snapshot)
        trainer.console.print(
            f"resuming after step {snapshot.progress.step} from {path}", highlight=False, soft_wrap=True
        )
        return snapshot.to_message()

    state, tensors = trainer.world.from_first(read)
    if state is None:
        return
    snapshot = Snapshot.from_message(state, tensors)
    trainer.install(snapshot.values, snapshot.moments)
    trainer.progress = snapshot.progress
    trainer.best = {name: value.to(trainer.world.device) for name, value in snapshot.best.items()}
    _put_head(trainer, snapshot.head)


def _put_head(trainer: Trainer, head: dict[str, torch.Tensor]) -> None:
    """Give the model a checkpoint's frozen head: that of `start_from`'s run, or the numbers of another torch."""
    if all(torch.equal(trainer.head[name], value) for name, value in head.items()):
        return
    set_head(trainer.model, head, "the checkpoint")
    trainer.head = head


def _check_origin(trainer: Trainer, path: str, snapshot: Snapshot) -> None:
    """Refuse a checkpoint of other inputs, and, where exactness is asked for, of another machinery."""
    # Earlier versions kept a hash of the ends of the weights' files.
    if snapshot.inputs not in (trainer.inputs, _inputs(trainer.data, identity_by_ends(trainer.recipe.backbone))):
        raise ValueError(
            f"{path}: the records or the backbone's weights are not those it was made with, though the recipe is; "
            "use another output_dir, or bring them back"
        )
    here = (trainer.world.size, torch.get_num_threads(), kernels_of(trainer.world.device))
    there = (snapshot.world_size, snapshot.threads, snapshot.kernels)
    if here != there:
        said = "{} rank(s) of {} thread(s) on {}"
        message = (
            f"{path}: written with {said.format(*there)}, this run has {said.format(*here)}; the result will agree "
            "only to rounding"
        )
        if trainer.recipe.training.resume == "exact":
            raise ValueError(
                f"{message} (training.resume is exact: start {snapshot.world_size} rank(s) with "
                f"OMP_NUM_THREADS={snapshot.threads} on {snapshot.kernels}, or set training.resume: auto)"
            )
        _warn(trainer.console, message)


def _take_best(trainer: Trainer) -> bool:
    """Give the adapter its values at the best evaluation and return true, or say that there was none."""
    if trainer.best:
        trainer.adapter.set_values(trainer.best)
        return True
    chosen_by = trainer.recipe.headline if trainer.recipe.training.best_by == "metric" else "eval_loss"
    _warn(
        trainer.console,
        f"training.keep is best, but no evaluation qualified ({chosen_by} was never finite, or ranks changed after "
        "the last one); the adapter is that of the last step",
    )
    return False


def _warn(console: Console, message: str) -> None:
    console.print(message, style="yellow", highlight=False, soft_wrap=True)


def _write_adapter(target: Path, trainer: Trainer) -> None:
    with new_folder(target, replace=True) as temporary:
        save_adapter(temporary, trainer.adapter, describe(trainer), trainer.head or None)


def describe(trainer: Trainer) -> dict[str, Any]:
    """Return what the adapter folder says about its origin."""
    recipe, progress = trainer.recipe, trainer.progress
    best = recipe.training.keep == "best" and progress.best_step is not None
    return {
        "base_model": recipe.backbone.path,
        "base_model_weights": trainer.weights,
        "kind": recipe.adapter.kind,
        "step": progress.best_step if best else progress.step,
        "best_loss": progress.best_loss,
        "best_metric": progress.best_metric,
        "target_tokens": progress.target_tokens,
        "records": [source.title for source in recipe.data.train],
        "contents": trainer.data.contents,
        "recipe": recipe.model_dump(mode="json"),
        "metatt_scale": __version__,
    }


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else 0  # right padding is never attended to, any id serves


def _report_data(counts: dict[str, Any], console: Console) -> None:
    for source in (*counts["train"], *counts["validation"]):
        bad = f", {source['skipped']} bad records skipped" if source.get("skipped") else ""
        cut = f", {source['truncated']} cut at the cutoff length" if source.get("truncated") else ""
        cut += f", {source['dropped']} without an answer dropped" if source.get("dropped") else ""
        text = f"data: {source['path']}: {source['examples']} examples{bad}{cut}"
        console.print(text, highlight=False, soft_wrap=True)


def _report_adapter(adapter: Adapter, console: Console) -> None:
    """Say what trains; values of the head are counted apart, as a comparison of adapters leaves them out."""
    own, targets = adapter.n_trained - adapter.n_head, adapter.targets
    text = f"training {own:,} parameters ({adapter.summary()})"
    if targets:
        text += f" behind {len(targets)} frozen linears"
    if adapter.n_head:
        text += f" and {adapter.n_head:,} of the classifier's head"
    if targets:
        text += f"; LoRA r=8 on the same would train {adapter.target_map.lora_parameters(8):,}"
    console.print(text, highlight=False, soft_wrap=True)
