"""The step-time table: three arms on the same tokens, taken in turn."""

import pytest

from metatt_scale.benchmark import Timing, measure_steps, ratios
from metatt_scale.cli import main
from metatt_scale.recipe import dump_recipe
from tests.toy import toy_recipe, write_toy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it


def test_three_arms_are_timed_round_by_round(tmp_path):
    write_toy(tmp_path)
    timings = measure_steps(toy_recipe(tmp_path), examples=2, length=16, repeats=3)
    assert [timing.name for timing in timings] == ["frozen", "metatt_4d", "PEFT LoRA r=8"]
    # rank 4 on q (32 -> 32) and v (32 -> 16) of three layers: 2 * 32 * 4 + (3 + 2) * 16; LoRA: 8 * (64 + 48) * 3
    assert [timing.trained for timing in timings] == [0, 336, 2688]
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in timings)


def test_ratios_are_taken_pair_by_pair():
    floor = Timing(name="frozen", trained=0, seconds=(1.0, 2.0, 4.0))
    arm = Timing(name="arm", trained=1, seconds=(1.1, 2.6, 4.8))
    assert ratios(arm, floor) == pytest.approx((1.2, 1.1, 1.3))


def test_the_command_prints_a_table_and_checks_its_numbers(tmp_path, capsys):
    write_toy(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(toy_recipe(tmp_path)))
    assert main(["benchmark", str(recipe), "--examples", "2", "--length", "16", "--repeats", "1"]) == 0
    assert "over frozen" in capsys.readouterr().out
    assert main(["benchmark", str(recipe), "--repeats", "0"]) == 2
    assert "--repeats is 0" in capsys.readouterr().err
