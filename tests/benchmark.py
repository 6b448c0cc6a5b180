"""What the tests of several benchmark tables share."""

import json
import math

import pytest

from metatt_scale.benchmark.arms import LORA_RANKS
from metatt_scale.cli import main

PEFT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
]
# Rank 4 on q (32 -> 32) and v (32 -> 16) of three layers; 5D: heads of width 8, so 4 of them.
TRAINED = {
    "frozen": 0,
    "MetaTT-4D r=4": 2 * 32 * 4 + (3 + 2) * 4**2,
    "MetaTT-5D r=4": (32 + 8) * 4 + (3 + 2 + 4) * 4**2,
    "MetaTT-(4+1)D r=4": 2 * 32 * 4 + (3 + 3 + 2) * 4**2,  # three tasks, mixed in every batch
    **{f"LoRA r={rank}": rank * (64 + 48) * 3 for rank in LORA_RANKS},
    "VeRA r=256": (2 * 256 + 32 + 16) * 3,
}
BACKBONES = [{}, {"dtype": "bfloat16", "quantization": "nf4"}, {"dtype": "bfloat16", "quantization": "int8"}]


def run(recipe_file, *arguments):
    """The JSON that a command leaves."""
    out = recipe_file.with_name("out.json")
    assert main(["benchmark", str(recipe_file), *arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    for row in report["rows"]:
        assert row["seconds"] and all(math.isfinite(s) and s > 0 for s in row["seconds"])
    assert {"torch", "transformers", "peft", "bitsandbytes", "device", "threads"} <= report["machine"].keys()
    return report
