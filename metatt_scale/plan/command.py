"""The arguments of `plan` and what it prints. Libraries are imported once the arguments are checked."""

from __future__ import annotations

import argparse
import json
import math
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from rich.console import Console

from metatt_scale.recipe import Recipe

SIMULATED = (2, 64, 1024)
"""Worlds of `--simulate` where --nodes and --gpus-per-node name none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `plan` takes besides a recipe and its overrides."""
    parser.add_argument("--nodes", type=int, help="nodes of the job (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each (8 with --nodes, else 1)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU, instead of the hardware's")
    parser.add_argument("--hardware", default="h100-sxm", metavar="NAME", help="h100-sxm, h200-sxm, a100-sxm, ...")
    parser.add_argument("--tflops", type=float, help="10^12 operations per second that a GPU sustains")
    parser.add_argument("--bandwidth-gbps", type=float, metavar="GBPS", help="10^9 bits per second of every link")
    parser.add_argument(
        "--answer-tokens", type=int, metavar="N", help="tokens per example that have a loss (all but the first)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    parser.add_argument("--simulate", action="store_true", help="count the collectives of a small model (CPU)")


def run(recipe: Recipe, options: Namespace, console: Console) -> int:
    """Print the plan of a recipe, or what a simulation counted.

    Raises:
        ValueError: an argument out of range, or what `plan` and `simulate` refuse.
    """
    _check(options)
    if options.simulate:
        return _simulate(recipe, options, console)
    from metatt_scale.plan.estimate import Machine, plan, with_overrides
    from metatt_scale.plan.table import plan_table
    from metatt_scale.plan.timing import known_hardware

    if options.answer_tokens is not None and recipe.data.train_on_inputs:
        raise ValueError(
            f"--answer-tokens is {options.answer_tokens}, but data.train_on_inputs is true, so all have a loss; "
            "leave it out, or set data.train_on_inputs: false"
        )
    known = known_hardware()
    if options.hardware not in known:
        raise ValueError(
            f"--hardware is {options.hardware}; known are {', '.join(known)}; for another give --tflops, "
            "--bandwidth-gbps and --memory"
        )
    hardware = with_overrides(known[options.hardware], options.tflops, options.bandwidth_gbps, options.memory)
    machine = Machine(
        nodes=options.nodes or 1,
        gpus_per_node=options.gpus_per_node or (8 if options.nodes else 1),
        hardware=hardware,
        answers=options.answer_tokens,
    )
    numbers = plan(recipe, machine)
    if options.json:
        print(json.dumps(numbers, indent=2))
    else:
        console.print(plan_table(numbers, recipe))
    return 0


def _simulate(recipe: Recipe, options: Namespace, console: Console) -> int:
    from metatt_scale.plan.simulate import simulate
    from metatt_scale.plan.table import simulation_table

    per_node = options.gpus_per_node or 8
    named = options.nodes or options.gpus_per_node
    worlds = ((options.nodes or 1) * per_node,) if named else SIMULATED
    found = []
    for ranks in worlds:
        with console.status(f"playing {ranks:,} ranks"):
            found.append(simulate(recipe, ranks, per_node))
    if options.json:
        print(json.dumps([asdict(simulation) for simulation in found], indent=2))
    else:
        console.print(simulation_table(found))
    return 0


def _check(options: Namespace) -> None:
    least: dict[str, Any] = {"nodes": 1, "gpus_per_node": 1, "answer_tokens": 1, "memory": 0, "tflops": 0}
    for name, bound in {**least, "bandwidth_gbps": 0}.items():
        value = getattr(options, name)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if bound == 0 and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{flag} is {value}; it must be a number greater than 0")
        if bound == 1 and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")
    ranks = (options.nodes or 1) * (options.gpus_per_node or 1)
    if ranks > 1 << 20:
        raise ValueError(f"--nodes x --gpus-per-node is {ranks:,} ranks; plan for at most {1 << 20:,}")
