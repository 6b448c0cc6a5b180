"""A finished run, read again on the device: by the toolkit, and by PEFT and transformers from its exports.

A GPU alone computes the logits that users of an export see.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.export import export
from metatt_scale.reopen import reopen
from metatt_scale.training import train
from tests.gpu.small import TARGETS, recipe_for
from tests.tiny import FLOAT32, relative, tokens
from tests.toy import CPU, quiet


@pytest.fixture(scope="module")
def finished(device, tmp_path_factory):
    """A trained run on a saved backbone: (folder around it, its logits)."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_for(folder, device, backbone={"path": str(folder / "saved")}, training={"learning_rate": 0.1})
    save_backbone(folder, device)
    run = train(recipe, quiet())
    assert next(run.model.parameters()).device == device
    return folder, logits_of(run.model.eval(), device)


def save_backbone(folder, device):
    """The random backbone of the recipes as a folder with weights, which an export can name."""
    recipe = recipe_for(folder, device)
    load_backbone(recipe.backbone, CPU).save_pretrained(folder / "saved")
    byte_tokenizer().save_pretrained(folder / "saved")


@torch.no_grad()
def logits_of(model, device):
    return model(tokens(length=40).to(device)).logits.float().cpu()


def base_of(folder, device):
    return AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32).to(device).eval()


def test_reopened(finished, device):
    folder, expected = finished
    opened = reopen(folder / "run", quiet(), device)
    error = relative(logits_of(opened.model, device), expected)  # its products may come in another order
    print(f"reopened: {error:.1e}")
    assert error < FLOAT32
    assert relative(logits_of(base_of(folder, device), device), expected) > 1e-3, "the adapter must matter"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_lora_in_peft(finished, device):
    """Beside the weights, and merged into them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder, expected = finished
    model = peft.PeftModel.from_pretrained(
        base_of(folder, device), export(folder / "run", "lora", quiet(), out=folder / "lora")
    ).eval()
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == set(TARGETS)
    errors = [relative(logits_of(model, device), expected)]
    errors.append(relative(logits_of(model.merge_and_unload(), device), expected))
    print("PEFT beside the weights and merged:", *(f"{error:.1e}" for error in errors))
    assert max(errors) < FLOAT32


def test_merged_in_transformers(finished, device):
    folder, expected = finished
    merged = export(folder / "run", "merged", quiet(), out=folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).to(device).eval()
    error = relative(logits_of(model, device), expected)
    print(f"merged: {error:.1e}")
    assert error < FLOAT32


def test_generation(finished, device):
    """With the adapter beside the weights, greedily: token by token what one forward of the whole text gives."""
    folder, _ = finished
    model, prompt_BS = reopen(folder / "run", quiet(), device).model, tokens(length=12).to(device)
    model.generation_config.eos_token_id = None  # 8 tokens in any case
    text_BT = model.generate(
        input_ids=prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=0,
    )
    assert text_BT.shape[1] == 20 and text_BT.device == device
    with torch.no_grad():
        best_BT = model(text_BT).logits[:, 11:-1].argmax(-1)
    assert torch.equal(best_BT, text_BT[:, 12:])
