"""PEFT's methods on one process and on two ranks: equal replicas, equal losses, equal factors.

    python -m tests.distributed.peft_methods [FOLDER]

prints the figures. The ranks compare the hashes of all trained values, moments, fixed factors and scores after every
step and stop at a difference, so a job that ends well had equal replicas throughout.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from metatt_scale.recipe import Recipe, dump_recipe, validate
from metatt_scale.training import train
from tests.distributed.jobs import TRAIN, finish, torchrun
from tests.toy import LLAMA, metrics, quiet, toy, write_toy

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "pissa": {"kind": "lora", "init": "pissa"},
    "olora": {"kind": "lora", "init": "olora"},
    "vera": {"kind": "vera", "rank": 64},
    "adalora": {"kind": "adalora", "adalora": {"init_r": 6, "tinit": 1, "tfinal": 2, "deltaT": 2}},
}
STRATEGIES = ("replicate", "fsdp2")
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4", "quant_storage": "bfloat16"},
}


def recipe_of(folder: Path, name: str, method: str, precision: str, strategy: str | None) -> Recipe:
    """Six steps of two micro-batches a rank and more; `strategy` None is for one process."""
    if not (folder / "data.jsonl").exists():
        write_toy(folder, config={**LLAMA, "hidden_size": 64, "intermediate_size": 128})
    training = {"max_steps": 6, "micro_batch_size": 4, "eval_every": 3, "learning_rate": 2e-3}
    parallel = {"check_replicas_every": 1, **({"backbone": strategy} if strategy else {})}
    wanted = toy(folder, output_dir=str(folder / name), training=training, parallel=parallel)
    wanted["backbone"] |= PRECISIONS[precision]
    wanted["adapter"] = {"rank": 4, "target_modules": ["q_proj", "v_proj"], **METHODS[method]}
    return validate(wanted, "toy")


def compare(folder: Path, method: str, precision: str, strategies: tuple[str, ...] = STRATEGIES) -> dict[str, Any]:
    """Return strategy -> (largest relative difference of a loss, and of a tensor of the adapter, to one process)."""
    one = train(recipe_of(folder, f"{method}-one", method, precision, None), quiet()).folder
    found = {}
    for strategy in strategies:
        name = f"{method}-{strategy}"
        file = folder / f"{name}.yaml"
        file.write_text(dump_recipe(recipe_of(folder, name, method, precision, strategy)))
        finish(torchrun(TRAIN, file), folder / f"{name}.log")
        pairs = list(zip(metrics(one), metrics(folder / name), strict=True))
        losses = [
            abs(two[key] / alone[key] - 1) for alone, two in pairs for key in ("loss", "eval_loss") if key in two
        ]
        alone, two = (load_file(run / "adapter" / "metatt.safetensors") for run in (one, folder / name))
        tensors = [float((two[key] - value).norm() / value.norm().clamp(min=1e-12)) for key, value in alone.items()]
        found[strategy] = (max(losses), max(tensors))
    return found


def main(folder: Path) -> None:
    """Print a line per method, precision and strategy."""
    for precision in PRECISIONS:
        for method in METHODS:
            for strategy, (loss, tensor) in compare(folder / precision, method, precision).items():
                print(f"{precision:8} {method:8} {strategy:10} loss {loss:.1e}  factors {tensor:.1e}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
