"""The most bytes of a training step, as the allocator counts them, beside what `plan` says."""

import pytest

from metatt_scale.backbone import load_backbone
from metatt_scale.plan.layout import lay_out
from tests.model.test_plan_memory import LLAMA, TOLERANCE, make_recipe, measured_and_estimate

LARGE = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32_000, "num_hidden_layers": 8}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_step_takes_what_plan_says(tmp_path, monkeypatch, device, quantization, recompute):
    monkeypatch.setattr("metatt_scale.backbone.attention._SHORT", 0)  # matters on a CPU only
    settings = {"quantization": quantization, "gradient_checkpointing": recompute}
    on_gpu = {"config": LARGE, "examples": 8, "tokens": 512} if device.type == "cuda" else {}
    recipe = make_recipe(tmp_path, backbone=settings, **on_gpu)
    model = load_backbone(recipe.backbone, device, 0).train()
    measured, estimate = measured_and_estimate(model, recipe, lay_out(recipe, 1, 1), device=device)
    assert estimate == pytest.approx(measured, rel=TOLERANCE)
