"""Trainable parameters of the paper's rows, through the same command a user types."""

import json
from pathlib import Path

import pytest

from metatt_scale.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROBERTA = ("backbone.path=random:{}", "adapter.target_modules=[query,value]")
COUNTS = [
    ("llama2_7b_commonsense", (), "metatt_4d", 16, 139_776),
    ("llama2_7b_commonsense", (), "metatt_4d", 256, 4_325_376),
    ("llama2_13b_commonsense", (), "metatt_4d", 16, 174_592),
    ("llama2_13b_commonsense", (), "metatt_4d", 64, 827_392),
    ("llama2_7b_commonsense", "roberta_base", "metatt_4d", 8, 13_184),
    ("llama2_7b_commonsense", "roberta_base", "metatt_4d", 24, 44_928),
    ("llama2_7b_commonsense", "roberta_base", "metatt_4d", 64, 155_648),
    ("llama2_7b_commonsense", "roberta_base", "metatt_5d", 16, 19_968),
    ("llama2_7b_commonsense", "roberta_base", "metatt_5d", 64, 159_744),
    ("llama2_7b_commonsense", "roberta_large", "metatt_4d", 8, 18_048),
    ("llama2_7b_commonsense", "roberta_large", "metatt_4d", 16, 39_424),
    ("llama2_7b_commonsense", "roberta_large", "metatt_4d", 32, 92_160),
    ("llama2_7b_commonsense", "roberta_large", "metatt_5d", 32, 77_824),
]


@pytest.mark.parametrize("recipe, architecture, kind, rank, count", COUNTS)
def test_counts_of_the_paper(capsys, recipe, architecture, kind, rank, count):
    overrides = [text.format(architecture) for text in ROBERTA] if architecture else []
    arguments = ["plan", str(RECIPES / f"{recipe}.yaml"), f"adapter.kind={kind}", f"adapter.rank={rank}", *overrides]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == count
    assert main(arguments) == 0  # and as text for a person
    assert f"{count:,}" in capsys.readouterr().out


def test_lora_beside_it(capsys):
    assert main(["plan", str(RECIPES / "llama2_7b_commonsense.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora_parameters"] == {"8": 4_194_304, "16": 8_388_608}
