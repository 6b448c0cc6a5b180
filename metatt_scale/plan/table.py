"""A plan, and a simulation, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from metatt_scale.recipe import Recipe, SweepRecipe

if TYPE_CHECKING:
    from metatt_scale.plan.simulate import Simulation


def size(count: float) -> str:
    """Return bytes in the largest unit below them, to three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return (
                f"{count:.0f} {unit}"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 1000
                else f"{count:,.0f} {unit}"
            )
        count /= 1024
    raise AssertionError


def seconds(value: float) -> str:
    """Return a time in seconds, milliseconds or microseconds."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def plan_table(numbers: dict[str, Any], recipe: Recipe) -> Group:
    """Return the sections of a plan: counts, memory of one rank, bytes on the wire, scaling."""
    if "memory" not in numbers:
        why = "memory, wire and time are estimated for tensor trains only"
        return Group(_counts(numbers, recipe), Text(why, style="yellow"))
    said = [Text(numbers["assumption"], style="yellow")] if numbers["assumption"] else []
    return Group(*said, _counts(numbers, recipe), _memory(numbers), _wire(numbers), _scaling(numbers))


def _section(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=bool(columns))
    table.padding = (0, 1, 0, 0)
    for index, column in enumerate(columns or ("", "", "")):
        text = not columns and index == 2  # notes may wrap, numbers may not
        table.add_column(column, justify="right" if index == 1 or (columns and index) else "left", no_wrap=not text)
    return table


def _counts(numbers: dict[str, Any], recipe: Recipe) -> Table:
    table = _section("trained")
    is_chain = "modes" in numbers
    form = (
        " x ".join(f"{mode} {n}" for mode, n in zip(numbers["modes"], numbers["sizes"], strict=True))
        if is_chain
        else numbers["summary"]
    )
    table.add_row("trainable parameters", f"{numbers['trainable_parameters']:,}", f"{numbers['adapter']}: {form}")
    if is_chain:
        ranks = ", ".join(map(str, numbers["ranks"]))
        table.add_row("ranks of the bonds", "", f"{ranks} at the start (all figures here)" if recipe.sweep else ranks)
    if recipe.sweep:
        table.add_row("sweeps", "", _sweeps(recipe.sweep))
    modules = f"{', '.join(name.split('*.')[-1] for name in numbers['projections'])}"
    table.add_row("adapted modules", f"{numbers['adapted_modules']:,}", modules)
    for rank, count in numbers["lora_parameters"].items() if numbers["lora_parameters"]["8"] else ():
        table.add_row(f"LoRA r={rank} instead", f"{count:,}", "")
    table.add_row("backbone parameters", f"{numbers['backbone_parameters']:,}", recipe.backbone.path)
    if recipe.classifier:
        start = "trained" if recipe.classifier.head == "trained" else "frozen at a random start"
        kind = ", ".join(
            f"{f'{name}: ' if name else ''}{'one number' if of.is_regression else f'{of.labels} classes'}"
            for name, of in recipe.label_sets.items()
        )
        table.add_row("head parameters", f"{numbers['head_parameters']:,}", f"{start}, {kind}")
    return table


def _sweeps(sweep: SweepRecipe) -> str:
    """Return when ranks change, and to what."""
    if sweep.schedule:
        points = ", ".join(f"{point.after}: {point.rank}" for point in sweep.schedule)
        return f"rank after {sweep.unit} {points}"
    each = f"every {sweep.every} {sweep.unit}s" if sweep.every > 1 else f"every {sweep.unit}"
    if sweep.formula:
        return f"{each}, {sweep.formula.sweeps} times, to rank {sweep.formula.final_rank} at last"
    return f"{each}, discarding at most {sweep.max_discarded_weight:g} of each bond's weight"


def _memory(numbers: dict[str, Any]) -> Table:
    layout, memory = numbers["layout"], numbers["memory"]
    weights, chain, activations = memory["weights"], memory["chain"], memory["activations"]
    copies = f"1 of {layout['ranks_per_copy']}" if layout["ranks_per_copy"] > 1 else "all"
    formula = "" if layout["activation_formula"] == "llama" else "; this architecture's activations are a rough guess"
    table = _section(f"memory of one of {layout['ranks']} ranks, {layout['strategy']} (estimate{formula})")
    table.add_row("weights", size(weights["total"]), f"shard: {copies}")
    for name, note in (
        ("packed", "4 or 8 bits"),
        ("quant_state", "scales, on every rank"),
        ("unquantised", "embeddings, norms, head; all if not quantised"),
    ):
        if weights[name]:
            table.add_row(f"  {name.replace('_', ' ')}", size(weights[name]), note)
    if memory["weights_on_host"]:
        table.add_row("  of it on the host", size(memory["weights_on_host"]), "cpu_offload")
    processes = min(layout["ranks"], layout["gpus_per_node"])
    each = f"per process, {processes} on a node; mapped files not counted"
    table.add_row("host while loading", size(memory["host_while_loading"]), each)
    parts = ", ".join(f"{name} {size(chain[name])}" for name in ("cores", "moments", "factors", "gradients"))
    table.add_row("chain", size(chain["total"]), parts)
    work = f"{layout['examples_per_micro_batch']} x {layout['tokens_per_example']} tokens"
    kept = "layer inputs, recomputed" if layout["gradient_checkpointing"] else "all layers"
    table.add_row("activations kept", size(activations["kept"]), f"{work}, {kept}, attention {layout['attention']}")
    table.add_row("  one layer's backward", size(activations["layer"]), "")
    targets = layout["answer_tokens_per_example"]
    table.add_row("  logits", size(activations["logits"]), f"{targets} target{'s' if targets > 1 else ''} an example")
    if layout["ranks_per_copy"] > 1:
        table.add_row("gathered at the peak", size(memory["gathered"]), _gathered_note(layout))
    table.add_row("peak", size(memory["peak"]), f"weights + chain + the largest phase: {memory['peak_at']}")
    fits = memory["largest_micro_batch"]
    remedy = "" if fits else "not even one fits: shard, quantise, or recompute (gradient_checkpointing)"
    table.add_row("largest micro-batch", f"{fits:,}", remedy or f"in {size(memory['limit'])}, nothing left over")
    return table


def _gathered_note(layout: dict[str, Any]) -> str:
    """Return what the gathered bytes are."""
    if layout["strategy"] != "zero3":
        return "a unit, and the next or its buffer"
    ahead = layout["values_fetched_ahead"]
    return f"DeepSpeed gathers up to {ahead:,} values ahead, see ds_configs/" if ahead else "one module at a time"


def _wire(numbers: dict[str, Any]) -> Table:
    wire, layout = numbers["wire"], numbers["layout"]
    steps = layout["micro_batches_per_step"]
    table = _section(
        f"per optimizer step of {steps} micro-batch{'es' if steps > 1 else ''}",
        "",
        "collectives",
        "buffers",
        "each rank sends",
    )
    chain, backbone, lora = wire["chain"], wire["backbone"], wire["lora_under_ddp"]
    table.add_row("chain: all-reduce", str(chain["all_reduces"]), size(chain["bytes"]), size(chain["sent"]))
    if backbone["all_gathers"]:
        row = (f"{backbone['all_gathers']:,}", size(backbone["bytes"]), size(backbone["sent"]))
        table.add_row("backbone: all-gathers", *row)
    table.add_row(f"LoRA r={lora['rank']} under DDP", "", size(lora["bytes"]), size(lora["sent"]))
    table.add_row("LoRA over chain", "", f"{wire['lora_over_chain']:.1f}", "")
    return table


def _scaling(numbers: dict[str, Any]) -> Table:
    hardware = numbers["hardware"]
    rates = (
        f"{hardware['name']}: {hardware['tflops']:.0f} TFLOP/s sustained, {hardware['node_gb_per_s']:g} GB/s within "
        f"and {hardware['network_gb_per_s']:g} GB/s between nodes of {numbers['scaling_gpus_per_node']}"
    )
    columns = ("ranks", "examples", "weights", "peak", "compute", "gathers", "chain", "step", "tok/s")
    table = _section(f"estimated step, same global batch, {numbers['scaling'][-1]['strategy']} ({rates})", *columns)
    for row in numbers["scaling"]:
        table.add_row(
            f"{row['ranks']:,}",
            f"{row['micro_batches']} x {row['examples_per_micro_batch']}",
            *(size(row[name]) for name in ("weights", "peak")),
            *(seconds(row[name]) for name in ("compute_s", "gathers_s", "chain_s", "step_s")),
            f"{row['tokens_per_s']:,.0f}",
        )
    idle = [row["ranks"] for row in numbers["scaling"] if row["busy_ranks"] < row["ranks"]]
    if idle:
        table.caption = f"from {idle[0]:,} ranks on some are idle: raise training.batch_size with the number of ranks"
        table.caption_justify = "left"
    return table


def simulation_table(simulations: Sequence[Simulation]) -> Table:
    """Return what each world's step issued beside the formulas."""
    columns = ("ranks", "collective", "count", "bytes", "formula", "a layer", "rank 0 owns", "last")
    table = _section("one optimizer step of a small model, one micro-batch, counted on one rank", *columns)
    for found in simulations:
        first = (f"{found.first_rank_bytes:,}", f"{found.last_rank_bytes:,}")
        for kind in sorted({*found.collectives, *found.expected}) or ["none"]:
            got, wanted = (side.get(kind, {"count": 0, "bytes": 0}) for side in (found.collectives, found.expected))
            each = sorted(set(found.layer_gathers.values())) if kind == "all_gather" else []
            table.add_row(
                f"{found.ranks:,}",
                kind.replace("_", "-"),
                str(got["count"]),
                f"{got['bytes']:,}",
                "equal" if got == wanted else f"{wanted['count']}: {wanted['bytes']:,}",
                " to ".join(map(str, {each[0]: 0, each[-1]: 0})) if each else "",
                *first,
            )
            first = ("", "")
    return table
