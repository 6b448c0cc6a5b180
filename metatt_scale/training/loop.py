"""The optimizer steps of a run: forward, backward, pull back, decide, step; evaluate and save in between."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter, ChainAdapter, full_cores
from metatt_scale.backbone.attention import boundaries_known
from metatt_scale.data import Batch, BatchOrder, PreparedData, TokenTable, micro_batches
from metatt_scale.device import to_device
from metatt_scale.parallel import World, check_same
from metatt_scale.recipe import Recipe
from metatt_scale.recipe.scores import is_loss
from metatt_scale.tensor import NotFiniteError
from metatt_scale.training import checkpoint
from metatt_scale.training.checkpoint import RunState
from metatt_scale.training.checks import METRICS_FILE, not_finite, values_digest, why_hopeless, why_not_finite
from metatt_scale.training.evaluations import forgetting, judge
from metatt_scale.training.metrics import MetricsFile, ProgressBar, Trackers, left_out, peak_memory_gib, shown
from metatt_scale.training.objective import evaluate_tasks, make_objective
from metatt_scale.training.optimizer import Moments, apply, clip, install, learning_rate, make_optimizer, moments_of
from metatt_scale.training.reduce import PendingSums, sum_step
from metatt_scale.training.seeds import derived_seed
from metatt_scale.training.signals import SignalCatcher, TrainingStopped
from metatt_scale.training.slices import SliceNorms, spectra
from metatt_scale.training.sweep_plan import plan_sweeps
from metatt_scale.training.sweeping import perform_sweep

_HALF_SCALE = 1024.0


@dataclass(frozen=True)
class _Launched:
    """A step whose numbers are not read yet."""

    step: int
    """Number of steps done with it."""
    epoch: int
    tokens: int
    """Target tokens of its global batch (of a classifier: examples)."""
    rate: float
    started: float
    sums: PendingSums
    slices: SliceNorms | None
    """Of the gradient, where the step is logged."""


@dataclass(kw_only=True)
class Trainer:
    """Everything the loop works with; `train` is its only entry."""

    recipe: Recipe
    model: PreTrainedModel
    adapter: Adapter
    data: PreparedData
    inputs: str
    """Digest of records and backbone, kept in every checkpoint."""
    pad_token_id: int
    world: World
    folder: Path
    console: Console
    """Silent on all ranks but the first."""
    weights: str = ""
    """Identity of the backbone's weights, as they were loaded; empty where it is not known."""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    """A classifier's frozen head, whole."""
    progress: RunState = field(default_factory=RunState)
    best: dict[str, Tensor] = field(default_factory=dict)
    """The adapter's tensors at the best evaluation so far."""

    def __post_init__(self) -> None:
        training = self.recipe.training
        self.optimizer = make_optimizer(self.adapter.trained().values(), training)
        self.order = BatchOrder(self.data.train, self.recipe.seed, training.batch_size)
        self.total_steps = training.steps(self.order.steps_per_epoch)
        self.sweeps = plan_sweeps(self.recipe, self.order.steps_per_epoch, self.total_steps)
        self.signals = SignalCatcher()
        self.stop_signal: int | None = None  # of any rank's, known to all since a step was read
        with self.adapter.choosing(0 if self.recipe.tasks else None):  # for the rows the model is tried with
            self.objective = make_objective(self.recipe, self.model, self.world, self.console)
        self.adapter.begin(self.total_steps)
        self.adapter.pull_back()  # nothing: the trials had no gradients; but forget what they folded
        self._launched: deque[_Launched] = deque()
        self._settled_at = 0.0
        # A GPU would idle while the host reads one step's numbers before it queues the next.
        self.read_late = self.world.device.type == "cuda"
        # Of all ranks: a choice that changes bits must not depend on their number.
        self.adapter.rows_per_step = math.ceil(float(self.data.table.lengths.mean()) * training.batch_size)

    @property
    def chain(self) -> ChainAdapter | None:
        """The adapter, if it is a chain."""
        return self.adapter if isinstance(self.adapter, ChainAdapter) else None

    def expected(self) -> checkpoint.Expected:
        """Return what a checkpoint of this run must hold."""
        return checkpoint.expected(self.adapter, self.head, self.total_steps)

    # ---- the life of a run

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            TrainingStopped: SIGTERM or SIGINT arrived; state is saved.
            DivergedError: too many steps in a row were not finite (the last good values are saved), or values are not
                finite any more (the last good ones are in the newest checkpoint).
        """
        first = self.world.is_first
        metrics = self._open_metrics() if first else None
        trackers = Trackers(self.recipe, self.folder, self.console) if first else None
        bar = ProgressBar(self.console, self.total_steps, self.progress.step, self.recipe.logging.every)
        if not self.progress.step:
            self._note_start()
        restore_signals = self.signals.catch()
        started, first_step = time.perf_counter(), self.progress.step

        def publish(step: int, report: dict[str, Any]) -> None:
            left = (time.perf_counter() - started) / (step - first_step) * (self.total_steps - step)
            bar.update(step, shown(self.recipe, report), left)
            if metrics and trackers and self._is_logged(step, report):
                metrics.write(step, report)
                trackers.log(step, report)

        try:
            while not self.progress.finished:
                self._launch()
                while len(self._launched) > self._unread_steps():
                    step, report = self._settle()
                    if not self._launched:
                        self._check_values()
                        self._sweep_if_due(report)
                        self._evaluate_if_due(report)
                    publish(step, report)
                if not self._launched:
                    self._compare_replicas_if_due()
                    self._save_if_due()  # after the metrics: a run killed between the two writes its line again
        except NotFiniteError as error:
            raise why_not_finite(self.progress, self.folder, str(error)) from None
        finally:
            restore_signals()
            bar.close()
            if metrics and trackers:
                trackers.close()
                metrics.close()

    def _open_metrics(self) -> MetricsFile:
        metrics = MetricsFile(self.folder / METRICS_FILE, self.progress.step)
        if metrics.left_out:
            self.console.print(left_out(metrics), style="yellow", highlight=False, soft_wrap=True)
        return metrics

    def _note_start(self) -> None:
        """Remember what the first step begins with, by which the end of the run is judged."""
        self.progress.start_values = values_digest(self.adapter)
        if self.recipe.adapter.start_from and self.data.validation is not None:
            self.progress.start_scores = {k: v for k, v in self.evaluate().items() if math.isfinite(v)}

    def _unread_steps(self) -> int:
        """Return how many steps may stay unread: the one in work, unless something is due that needs its numbers."""
        return 0 if not self.read_late or self._needs_values() or self._replicas_due() else 1

    def _needs_values(self) -> bool:
        """Return whether the values that a step has left are evaluated, cut or saved."""
        training, step = self.recipe.training, self.progress.step
        due = self._due(training.eval_every) or self._due(training.save_every) or self.sweeps.due(step)
        return due or self.progress.finished or self._is_hopeless() or self.stop_signal is not None

    def _check_values(self) -> None:
        """Refuse to go on with values that are not finite: every further step would be skipped.

        Raises:
            NotFiniteError: names the parameter.
        """
        if self._needs_values() and (name := not_finite(self.adapter)) is not None:
            raise NotFiniteError(f"{name} holds values that are not finite")

    def _is_logged(self, step: int, report: dict[str, Any]) -> bool:
        last = self.progress.finished and step == self.progress.step
        return step % self.recipe.logging.every == 0 or "eval_loss" in report or "sweep" in report or last

    def _launch(self) -> None:
        """Queue one optimizer step; nothing waits for the device."""
        training, step = self.recipe.training, self.progress.step
        started = time.perf_counter()
        epoch, tokens, sums = self._gradient(step)
        logged, chain = (step + 1) % self.recipe.logging.every == 0, self.chain
        slices = SliceNorms(chain) if chain is not None and logged else None
        rate = learning_rate(training, step, self.total_steps) * self.sweeps.warmup(step)
        clip(self._gradients(), sums.gradient_norm, training.max_grad_norm)
        apply(self.optimizer, sums.finite, rate, lambda: self.adapter.stepped(step + 1, sums.finite))
        self.progress.step += 1
        self.progress.finished = self.progress.step >= self.total_steps
        self._launched.append(_Launched(self.progress.step, epoch, tokens, rate, started, sums, slices))

    def _gradient(self, step: int) -> tuple[int, int, PendingSums]:
        """Leave a step's gradient on the parameters; return its epoch, target tokens, and sums."""
        epoch, indices = self.order.global_batch(step)
        tokens = self.objective.denominator(self.data.table, indices)
        loss_sum, length = self._accumulate(indices, tokens, step)
        return epoch, tokens, sum_step(self.world, self._gradients(), loss_sum, length, self.signals.received)

    def _gradients(self) -> list[Tensor]:
        return [value.grad for value in self.adapter.trained().values() if value.grad is not None]

    def _settle(self) -> tuple[int, dict[str, Any]]:
        """Wait for the oldest step in work; return which it was and its numbers."""
        done = self._launched.popleft()
        sums = done.sums.read()
        self.stop_signal = self.stop_signal or sums.stop_signal
        self._count(sums.finite, done.tokens)
        now = time.perf_counter()
        seconds, self._settled_at = now - max(done.started, self._settled_at), now
        return done.step, {
            "epoch": done.epoch,
            "loss": sums.loss / done.tokens if sums.finite else None,
            "grad_norm": sums.gradient_norm if sums.finite else None,
            "learning_rate": done.rate,
            "tokens_per_second": sums.tokens / seconds,
            "seconds": seconds,
            **({"ranks": list(self.chain.spec.ranks)} if self.chain else {}),
            "memory_gib": peak_memory_gib(self.world.device),
            "skipped": self.progress.skipped,
            **({"gradient_norms": done.slices.read()} if done.slices and sums.finite else {}),
        }

    @boundaries_known()
    def _accumulate(self, indices: Any, tokens: int, step: int) -> tuple[Tensor, int]:
        """Run this rank's micro-batches of a global batch; return its summed loss and the tokens it sent through."""
        self.model.train()
        # Dropout is a pure function of (seed, step, rank), so a resumed run draws the same masks.
        torch.manual_seed(derived_seed("dropout", self.recipe.seed, step, self.world.rank))
        loss_sum, length = torch.zeros((), dtype=torch.float64, device=self.world.device), 0
        # Half precision loses gradients below 6e-8: scale them up on their way, and down again in the fp32 cores.
        scale = _HALF_SCALE if self.adapter.compute_dtype == torch.float16 else 1.0
        weights_T = self.objective.weights(self.data.table, indices)
        for batch in self._own_batches(self.data.table, indices):
            loss = self.objective.loss_sum(batch, weights_T)
            (loss * (scale / tokens)).backward()
            loss_sum += loss.detach()
            length += int(batch.attention_mask_BS.sum())
        self.adapter.penalise(scale / self.world.size)
        self.adapter.pull_back()
        if scale != 1.0:
            for gradient in self._gradients():
                gradient /= scale
        return loss_sum, length

    def _own_batches(self, table: TokenTable, indices: Any) -> Iterator[Batch]:
        for batch in micro_batches(
            table,
            indices,
            micro_batch_size=self.recipe.training.micro_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            pad_token_id=self.pad_token_id,
            packed=self.objective.packed,
        ):
            tasks_BS = batch.tasks_BS
            self.adapter.row_tasks = None if tasks_BS is None else to_device(tasks_BS, self.world.device)
            yield batch

    def _count(self, finite: bool, tokens: int) -> None:
        progress = self.progress
        if finite:
            progress.skipped_in_a_row = 0
            progress.target_tokens += tokens
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1

    def _is_hopeless(self) -> bool:
        return self.progress.skipped_in_a_row >= self.recipe.training.max_nonfinite_steps

    def _sweep_if_due(self, report: dict[str, Any]) -> None:
        """Change the ranks where the recipe says so; the report tells what happened."""
        step = self.progress.step
        if not self.sweeps.due(step):
            return
        assert self.chain is not None, "the recipe refuses a sweep of anything else"
        result = perform_sweep(
            self.recipe,
            self.sweeps.targets[step],
            self.chain,
            moments_of(self.optimizer, self.adapter.trained()),
            self.world,
            lambda i: self._gradient(step + i)[-1],
            derived_seed("sweep", self.recipe.seed, step),
        )
        if result.report["ranks_before"] != result.report["ranks_after"]:
            # The best cores so far have ranks that were not asked to last.
            self.progress.forget_best()
            self.best = {}
        self.install(result.values, result.moments)
        self.stop_signal = self.stop_signal or result.stop_signal
        report["sweep"], report["ranks"] = result.report, result.report["ranks_after"]
        self.progress.sweeps.append({"step": step, "ranks": report["ranks"]})

    def install(self, values: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        """Go on with these values (cores may have other ranks) and these moments."""
        self.optimizer = install(self.adapter, values, moments, self.recipe.training)

    def _evaluate_if_due(self, report: dict[str, Any]) -> None:
        """Evaluate where the recipe says so; the report gets the scores (None where one is not finite)."""
        if self._due(self.recipe.training.eval_every) and self.data.validation is not None:
            scores = self.evaluate()
            losses = [score for name, score in scores.items() if is_loss(name)]
            self.progress.last_evaluation_finite = all(map(math.isfinite, losses))
            self._judge(scores)
            report |= {} if self.adapter.settled else {"settled": False}
            report |= {name: score if math.isfinite(score) else None for name, score in scores.items()}
            if lost := forgetting(self.recipe, self.progress.tasks_before, self.progress.start_scores, scores):
                report["forgetting"] = lost
            if self.chain is not None:
                report["spectra"] = spectra(full_cores(self.chain.spec, list(self.chain.cores)))

    def _save_if_due(self) -> None:
        """Save where the recipe says so, and before a stop: by a signal, or because no step succeeds any more."""
        training, progress, number = self.recipe.training, self.progress, self.stop_signal
        hopeless = self._is_hopeless()
        stopped = number is not None and not progress.finished
        if hopeless or stopped or progress.finished or self._due(training.save_every):
            self._save()
        if hopeless:
            raise why_hopeless(progress, self.folder)
        if number is not None and stopped:
            raise TrainingStopped(number, progress.step)

    def _due(self, every: int | str) -> bool:
        if every == "never":
            return False
        if every == "epoch":
            return self.progress.step % self.order.steps_per_epoch == 0 or self.progress.finished
        assert isinstance(every, int)
        return self.progress.step % every == 0 or self.progress.finished

    def _judge(self, scores: dict[str, float]) -> None:
        """Remember the best values, and stop early where the recipe says so."""
        if not self.adapter.settled:
            return
        improved, stopped = judge(self.progress, self.recipe, scores)
        if improved:
            self.best = {name: value.clone() for name, value in self.adapter.tensors().items()}
        if stopped is not None:
            left = sum(step > self.progress.step for step in self.sweeps.targets)
            self.console.print(stopped + (f"; {left} sweeps were not made" if left else ""), highlight=False)

    @boundaries_known()
    def evaluate(self) -> dict[str, float]:
        """Return the scores over the validation records, `eval_loss` (nats) first."""
        assert self.data.validation is not None
        self.model.eval()
        data, tasks = self.data.validation, tuple(self.recipe.tasks)
        scores = evaluate_tasks(self.objective, self.adapter, tasks, data, self._own_batches)
        self.model.train()
        return scores

    def _save(self) -> None:
        def write() -> None:
            snapshot = checkpoint.take_snapshot(
                self.adapter, self.optimizer, self.progress, self.best, self.inputs, self.world, self.head
            )
            checkpoint.save(self.folder / "checkpoints", snapshot, self.recipe)

        self.world.on_first(write)

    def _replicas_due(self) -> bool:
        step = self.progress.step
        regular = step % self.recipe.parallel.check_replicas_every == 0 or self.progress.finished
        return regular or self.sweeps.due(step)

    def _compare_replicas_if_due(self) -> None:
        if self._replicas_due():
            moments = moments_of(self.optimizer, self.adapter.trained())
            things = {
                name: [value, *(state for _, state in sorted(moments.get(name, {}).items()))]
                for name, value in self.adapter.tensors().items()
            }
            remedy = "training on would be meaningless; go on from the last checkpoint and watch that rank's machine"
            check_same(self.world, things, f"found after step {self.progress.step}: {remedy}")
