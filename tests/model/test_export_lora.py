"""LoRA exports, read by PEFT."""

import json

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig

from metatt_scale.adapter import load_adapter
from metatt_scale.backbone import load_backbone
from metatt_scale.export import export
from tests.exports import QUIET, logits_of, untrained_run
from tests.tiny import FLOAT32, WIDE, relative
from tests.toy import CPU

pytestmark = [
    pytest.mark.usefixtures("quiet_bitsandbytes"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]


def check_lora(run, base, ours):
    """PEFT on `base` gives the logits `ours`, also merged; returns PEFT's configuration."""
    frozen, training = logits_of(base), base.training
    folder = run / "exports" / "lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert {w.shape[0] for n, w in weights.items() if "lora_A" in n} == {config["r"]}
    with_lora = PeftModel.from_pretrained(base, folder)
    with_lora.train(training)  # PEFT has put it into eval mode
    errors = [relative(logits_of(with_lora), ours)]
    assert relative(frozen, ours) > 1e-2, "the adapter must matter"
    if not any(isinstance(module, Linear4bit) for module in base.modules()):
        merged = with_lora.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        errors.append(relative(logits_of(merged), ours))
    print("PEFT against ours, beside and merged:", *(f"{error:.1e}" for error in errors))
    assert max(errors) < FLOAT32
    return config


CASES = {
    "gqa_mlp": ("llama", ["q_proj", "k_proj", "v_proj", "down_proj", "gate_proj"], {}),
    "all_linear": ("llama", "all-linear", {"layers": [1, 3]}),
    "conv1d": ("gpt2", ["c_attn", "mlp.c_proj"], {}),
    "fused": ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], {}),
    "bias": ("qwen2", ["q_proj", "v_proj"], {}),
    "masked": ("roberta", ["query", "value", "attention.output.dense"], {}),
    "5d": ("llama", ["q_proj", "k_proj", "down_proj"], {"kind": "metatt_5d", "rank": [2, 3, 4, 5]}),
    "5d_conv1d": ("gpt2", ["c_attn"], {"kind": "metatt_5d", "rank": 3}),
    "layer_first": (
        "llama",
        ["q_proj", "k_proj", "down_proj"],
        {"mode_order": ["layer", "input", "projection", "output"]},
    ),
    "output_first": (
        "llama",
        ["q_proj", "k_proj", "down_proj"],
        {"mode_order": ["output", "layer", "projection", "input"]},
    ),
    "5d_input_last": (
        "llama",
        ["q_proj", "k_proj"],
        {
            "kind": "metatt_5d",
            "rank": [2, 3, 4, 5],
            "mode_order": ["layer", "output", "head", "projection", "input"],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lora_on_the_same_backbone(case, tmp_path):
    name, target_modules, changes = CASES[case]
    run, _, adapted = untrained_run(tmp_path, name, adapter={"target_modules": target_modules, **changes})
    export(run, "lora", QUIET)
    auto = AutoModelForMaskedLM if name == "roberta" else AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    config = check_lora(run, base, logits_of(adapted))
    # The bond next to the cores that make up the output: B = G4, in 5D B = G4[h] G5.
    assert config["r"] == {"5d": 4, "5d_conv1d": 3, "output_first": 3, "5d_input_last": 4}.get(case, 5)
    assert config["lora_alpha"] == 1.5 * config["r"]
    assert config["use_rslora"] is False and config["fan_in_fan_out"] is (name == "gpt2")
    assert config["task_type"] == (None if name == "roberta" else "CAUSAL_LM")


def test_lora_of_a_trained_run(trained_run):
    folder, run, _ = trained_run
    export(run.folder, "lora", QUIET)
    base = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=torch.float32)
    check_lora(run.folder, base, logits_of(run.model))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_lora_on_a_four_bit_backbone(tmp_path, double):
    """PEFT's own 4-bit layers, on a backbone that transformers packed from the same folder.

    In train mode, as bitsandbytes computes otherwise (in bf16) on CPUs with avx512_bf16 in eval mode. The packed
    weights are the same, so float32 rounding is all that may differ.
    """
    backbone = {"quantization": "nf4", "double_quantization": double}
    run, _, adapted = untrained_run(tmp_path, model=WIDE, backbone=backbone)
    export(run, "lora", QUIET)
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "backbone", dtype=torch.float32, quantization_config=packed, device_map="cpu"
    ).train()
    assert type(base.model.layers[0].self_attn.q_proj) is Linear4bit
    check_lora(run, base, logits_of(adapted))


def test_lora_of_a_bf16_run_keeps_float32_factors(tmp_path):
    """The cores are float32 whatever the backbone computes in; PEFT then adds them to a float32 model exactly."""
    run, recipe, _ = untrained_run(tmp_path, backbone={"dtype": "bfloat16"})
    export(run, "lora", QUIET)
    wide = load_backbone(recipe.backbone.model_copy(update={"dtype": "float32"}), CPU)
    load_adapter(run / "adapter", wide, CPU)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    check_lora(run, base, logits_of(wide))
