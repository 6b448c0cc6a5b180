"""The command line: train, evaluate, export, plan, generate, benchmark, study, report, quickstart, doctor.

Anything the user can mend is one message on stderr and exit code 2 (3 where training diverged); `doctor` exits with 2
where a line is a problem. A run stopped by a signal exits with 128 plus the signal's number (docs/exit_codes.md).
METATT_DEBUG=1 shows the traceback behind a message. Libraries are imported by the command that needs them, after its
arguments and recipe are checked.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from metatt_scale import __version__
from metatt_scale.benchmark.command import run as run_benchmark
from metatt_scale.benchmark.settings import add_arguments as add_benchmark_arguments
from metatt_scale.doctor.command import add_doctor
from metatt_scale.ending import (
    DIVERGED,
    DivergedError,
    leave,
    message_of,
    nccl_failed,
    out_of_memory,
    told_elsewhere,
    which_rank,
)
from metatt_scale.libraries import quiet_libraries
from metatt_scale.paths import path_argument
from metatt_scale.plan.command import add_arguments as add_plan_arguments
from metatt_scale.plan.command import run as run_plan
from metatt_scale.process import set_process_defaults
from metatt_scale.recipe import EvaluationRecipe, RecipeError, check, load_recipe, only_language_models
from metatt_scale.report.command import add_report
from metatt_scale.study.command import add_study

_GIVE_WAY_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parse(arguments)
        set_process_defaults(os.environ)
        quiet_libraries()
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("METATT_DEBUG"):
            raise
        if isinstance(error, RecipeError) and os.environ.get("LOCAL_RANK", "0") != "0":
            # What is wrong with arguments or recipe every process finds: the first of each node tells it, and the
            # launcher ends this one meanwhile. If it does not, the error is this one's alone.
            time.sleep(_GIVE_WAY_SECONDS)
        print(f"error{which_rank()}: {message_of(error)}", file=sys.stderr)
        return DIVERGED if isinstance(error, DivergedError) else 2
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("METATT_DEBUG"):
            raise
        if (why := out_of_memory(error) or nccl_failed(error)) is not None:
            print(f"error{which_rank()}: {why}", file=sys.stderr)
            return 2
        if isinstance(error, MemoryError) or (why := told_elsewhere(error)) is None:
            raise
        if why:
            # The rank that failed is still on its way out: its own error should stand first, and launchers take the
            # first process that exits for the cause. They end this one meanwhile.
            time.sleep(_GIVE_WAY_SECONDS)
            print(f"error{which_rank()}: {why}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end this process with its exit code (1 after an error of ours, with its traceback)."""
    try:
        code = main(arguments)
    except Exception as error:  # told before the interpreter is taken down, for which NCCL may wait
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    leave(code)


def _one_process(command: str) -> None:
    """Refuse several processes for what one does: each would do all of it."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ValueError(
            f"started as one of {world} processes (WORLD_SIZE), but `{command}` works in one; start it with python"
        )


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides up to the next option only and leaves over those of `plan RECIPE --json key=value`.
    if any(argument.startswith("-") or "=" not in argument for argument in rest) or (
        rest and "overrides" not in options
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="metatt-scale", description="Fine-tuning with one global tensor train")
    parser.add_argument("--version", action="version", version=f"metatt-scale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe, or go on where it stopped")
    _add_recipe(train)
    train.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # put there by the deepspeed launcher
    train.set_defaults(run=_train)

    _add_evaluate(commands)
    _add_export(commands)

    plan = commands.add_parser("plan", help="what a recipe trains and takes, without weights or GPU")
    _add_recipe(plan)
    add_plan_arguments(plan)
    plan.set_defaults(run=_plan)

    generate = commands.add_parser("generate", help="let a run continue a prompt")
    _add_run(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    generate.add_argument("--backbone-only", action="store_true", help="leave the adapter out")
    _add_task(generate)
    _add_device(generate)
    generate.set_defaults(run=_generate)

    benchmark = commands.add_parser("benchmark", help="time and memory beside the frozen model and PEFT")
    _add_recipe(benchmark)
    add_benchmark_arguments(benchmark)
    benchmark.set_defaults(run=_benchmark)

    add_study(commands)
    add_report(commands)
    quickstart = commands.add_parser("quickstart", help="the README's first example, from nothing to exports")
    _add_recipe(quickstart)
    quickstart.set_defaults(run=_quickstart)
    add_doctor(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="score a run with lm-evaluation-harness")
    _add_run(evaluate)
    evaluate.add_argument("--tasks", help="comma-separated task names; those of the recipe when absent")
    evaluate.add_argument(
        "--data", type=path_argument, help="folder of local task files; the hub when absent here and in the recipe"
    )
    evaluate.add_argument("--limit", type=int, help="questions per task")
    evaluate.add_argument("--batch-size", type=int, help="sequences per forward")
    _add_task(evaluate)
    _add_device(evaluate)
    evaluate.add_argument("--zero-shot", action="store_true", help="score the frozen backbone too, for comparison")
    evaluate.set_defaults(run=_evaluate)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a LoRA, merged or metatt folder")
    _add_run(export)
    export.add_argument("--to", required=True, choices=("lora", "merged", "metatt"))
    export.add_argument("--out", type=path_argument, help="target folder; RUN/exports/FORMAT when absent")
    export.add_argument(
        "--merge-base",
        choices=("original", "dequantised"),
        default="original",
        help="weights that `merged` starts from when the backbone was quantised",
    )
    _add_task(export)
    _add_device(export)
    export.add_argument("--replace", action="store_true", help="overwrite an existing export")
    export.set_defaults(run=_export)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path_argument, help="YAML file, see recipes/")
    # With a default, or argparse would name them among the arguments that are required and missing.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="e.g. training.max_steps=100"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="auto", help="a GPU where there is one, if absent"
    )


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", help="name of one of the run's `tasks`, where each has weights of its own")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_adapter", metavar="RUN", type=path_argument, help="run directory or adapter folder")
    parser.add_argument("--backbone", type=path_argument, help="where the backbone is, if not where the run found it")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code of the backbone's repository"
    )


def _backbone(options: Namespace) -> dict[str, object]:
    """Return the keys of the recipe's backbone section that the command line replaces."""
    given: dict[str, object] = {"trust_remote_code": options.trust_remote_code}
    return given if options.backbone is None else {**given, "path": options.backbone}


def _console(*, stderr: bool = False) -> Console:
    """Return where progress goes; only the first rank of a job shows any."""
    return Console(markup=False, stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")  # paths may hold brackets


def _train(options: Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from metatt_scale.training import TrainingStopped, train

    console = _console()
    try:
        run = train(recipe, console)
    except TrainingStopped as stop:
        if not console.quiet:
            print(str(stop), file=sys.stderr)
        return stop.exit_code
    form = {"full": "merged", "head_only": "merged", "loretta_adp": "metatt"}.get(recipe.adapter.kind, "lora")
    name = next(iter(recipe.tasks), None)
    task = f" --task {name}" if name else ""
    own = f" --tasks {name}" if name in recipe.evaluation.tasks else ""  # of the same name: a task's own benchmark
    folder = shlex.quote(str(run.folder))
    evaluate = "" if recipe.classifier else f"metatt-scale evaluate {folder}{task}{own}, "
    of_task = "" if form == "metatt" else task
    console.print(f"next: {evaluate}metatt-scale export {folder} --to {form}{of_task}", soft_wrap=True)
    return 0


def _evaluate(options: Namespace) -> int:
    from metatt_scale.evaluation import score_table
    from metatt_scale.reopen import adapter_folder, read_recipe
    from metatt_scale.scoring import score_run

    recipe = read_recipe(adapter_folder(options.run_or_adapter), _backbone(options))[1]
    only_language_models(recipe, "evaluate")
    settings = _evaluation_settings(options, recipe.evaluation)
    console = _console()
    scores = score_run(
        options.run_or_adapter,
        settings,
        console,
        backbone=_backbone(options),
        zero_shot=options.zero_shot,
        task=options.task,
        device=options.device,
    )
    console.print(score_table(scores))
    return 0


def _evaluation_settings(options: Namespace, recipe: EvaluationRecipe) -> EvaluationRecipe:
    given = {"data": options.data, "limit": options.limit, "batch_size": options.batch_size}
    if options.tasks is not None:
        given["tasks"] = [task.strip() for task in options.tasks.split(",") if task.strip()]
    merged = {**recipe.model_dump(mode="json"), **{key: value for key, value in given.items() if value is not None}}
    if not merged["tasks"]:
        raise ValueError("no tasks: name some with --tasks, for example --tasks boolq,piqa")
    for key in ("limit", "batch_size"):
        if merged[key] is not None and merged[key] < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {merged[key]}; it must be at least 1")
    return check(merged, "evaluate", EvaluationRecipe)


def _export(options: Namespace) -> int:
    _one_process("export")
    from metatt_scale.export import export

    export(
        options.run_or_adapter,
        options.to,
        _console(),
        out=options.out,
        merge_base=options.merge_base,
        backbone=_backbone(options),
        replace=options.replace,
        task=options.task,
        device=options.device,
    )
    return 0


def _plan(options: Namespace) -> int:
    _one_process("plan")
    return run_plan(load_recipe(options.recipe, options.overrides), options, _console())


def _generate(options: Namespace) -> int:
    _one_process("generate")
    from metatt_scale.evaluation.generate import check_limits, generate
    from metatt_scale.hardware import pick_device
    from metatt_scale.reopen import adapter_folder, read_recipe, reopen, task_index

    recipe = read_recipe(adapter_folder(options.run_or_adapter))[1]
    only_language_models(recipe, "generate")
    limits = options.max_new_tokens, options.temperature
    check_limits(*limits)
    console = _console(stderr=True)  # stdout is the text alone
    device = pick_device(options.device, console, recipe.backbone.dtype)
    opened = reopen(options.run_or_adapter, console, device, _backbone(options))
    opened.adapter.enabled = not options.backbone_only
    opened.adapter.task = task_index(opened.recipe, options.task)
    opened.adapter.one_task()  # or says that one has to be chosen
    print(generate(opened.model, opened.tokenizer, options.prompt, device, *limits))
    return 0


def _benchmark(options: Namespace) -> int:
    if options.table != "wire":
        _one_process(f"benchmark --table {options.table}")
    return run_benchmark(load_recipe(options.recipe, options.overrides), options, _console())


def _quickstart(options: Namespace) -> int:
    _one_process("quickstart")
    from metatt_scale.quickstart import quickstart
    from metatt_scale.training import TrainingStopped

    try:
        quickstart(Path(options.recipe), options.overrides, _console())
    except TrainingStopped as stop:
        print(str(stop), file=sys.stderr)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    run()
