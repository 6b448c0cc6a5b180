"""The arguments of `plan` and what it prints. Libraries are imported once the arguments are checked."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from dataclasses import asdict

from rich.console import Console

from metatt_scale.plan import GPUS_PER_NODE
from metatt_scale.recipe import Recipe, only_chains, only_language_models

SIMULATED = (2, 64, 1024)
"""Worlds of `--simulate` where --nodes and --gpus-per-node name none."""
_MOST_SIMULATED = 1024  # a hybrid mesh has a group for every row and column, each with a list of its ranks
_DEFAULT_HARDWARE = "h100-sxm"
_BOUNDS = {
    "nodes": (1, 1 << 20),
    "gpus_per_node": (1, 1 << 20),
    "answer_tokens": (1, 1 << 30),
    "memory": (1e-3, 1e6),
    "tflops": (1e-3, 1e6),
    "bandwidth_gbps": (1e-3, 1e6),
}
"""The least and the most of each number; from there on estimates are no longer finite numbers, or of no machine."""
_ESTIMATES_ONLY = ("answer_tokens", "memory", "tflops", "bandwidth_gbps", "hardware")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `plan` takes besides a recipe and its overrides."""
    parser.add_argument("--nodes", type=int, help="nodes of the job (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each (8 with --nodes, else 1)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU, instead of the hardware's")
    parser.add_argument("--hardware", metavar="NAME", help="h100-sxm (where absent), h200-sxm, a100-sxm, ...")
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
    only_language_models(recipe, "plan")
    if options.simulate:
        only_chains(recipe, "plan --simulate")
        return _simulate(recipe, options, console)
    from metatt_scale.plan.estimate import Machine, plan, with_overrides
    from metatt_scale.plan.table import plan_table
    from metatt_scale.plan.timing import known_hardware

    if options.answer_tokens is not None and recipe.data.train_on_inputs:
        raise ValueError(
            f"--answer-tokens is {options.answer_tokens}, but data.train_on_inputs is true, so all have a loss; "
            "leave it out, or set data.train_on_inputs: false"
        )
    known, name = known_hardware(), options.hardware or _DEFAULT_HARDWARE
    if name not in known:
        raise ValueError(
            f"--hardware is {name}; known are {', '.join(known)}; for another give --tflops, "
            "--bandwidth-gbps and --memory"
        )
    hardware = with_overrides(known[name], options.tflops, options.bandwidth_gbps, options.memory)
    nodes, per_node = _size(options)
    machine = Machine(nodes=nodes, gpus_per_node=per_node, hardware=hardware, answers=options.answer_tokens)
    numbers = plan(recipe, machine)
    if options.json:
        print(json.dumps(numbers, indent=2, allow_nan=False))
    else:
        console.print(plan_table(numbers, recipe))
    return 0


def _simulate(recipe: Recipe, options: Namespace, console: Console) -> int:
    from metatt_scale.plan.layout import assumption
    from metatt_scale.plan.simulate import simulate
    from metatt_scale.plan.table import simulation_table

    named = options.nodes or options.gpus_per_node
    nodes, per_node = _size(options) if named else (1, GPUS_PER_NODE)
    worlds = (nodes * per_node,) if named else SIMULATED
    found = []
    for ranks in worlds:
        with console.status(f"playing {ranks:,} ranks"):
            found.append(simulate(recipe, ranks, per_node))
    if options.json:
        print(json.dumps([asdict(simulation) for simulation in found], indent=2))
    else:
        console.print(assumption(recipe) or "", simulation_table(found), sep="\n", highlight=False)
    return 0


def _size(options: Namespace) -> tuple[int, int]:
    """Return (nodes, GPUs of each)."""
    return options.nodes or 1, options.gpus_per_node or (GPUS_PER_NODE if options.nodes else 1)


def _check(options: Namespace) -> None:
    for name, (least, most) in _BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:  # also what is not a number
            raise ValueError(f"{_flag(name)} is {value}; it must be a number from {least} to {most:,.0f}")
    nodes, per_node = _size(options)
    most = _MOST_SIMULATED if options.simulate else 1 << 20
    if nodes * per_node > most:
        raise ValueError(
            f"--nodes x --gpus-per-node is {nodes} x {per_node} = {nodes * per_node:,} ranks; "
            f"{'simulate' if options.simulate else 'plan for'} at most {most:,}"
        )
    unused = [_flag(name) for name in _ESTIMATES_ONLY if options.simulate and getattr(options, name) is not None]
    if unused:
        raise ValueError(f"--simulate counts collectives and has no use for {', '.join(unused)}; leave it out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
