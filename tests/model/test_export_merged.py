"""Merged exports, read by plain transformers."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from metatt_scale.adapter import load_adapter
from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.export import export
from tests.exports import QUIET, logits_of, untrained_run
from tests.tiny import FLOAT32, MODELS, WIDE, relative
from tests.toy import CPU


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "roberta"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_is_a_plain_model(tmp_path, name, tied):
    targets = MODELS[name][3]
    run, _, adapted = untrained_run(
        tmp_path, name, model={"tie_word_embeddings": tied}, adapter={"target_modules": targets}
    )
    folder = export(run, "merged", QUIET)
    auto: Any = AutoModelForMaskedLM if name == "roberta" else AutoModelForCausalLM
    reread, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    frozen = auto.from_pretrained(tmp_path / "backbone")
    error = relative(logits_of(reread), logits_of(adapted))
    print("merged against beside:", f"{error:.1e}")
    assert error < FLOAT32 and relative(logits_of(frozen), logits_of(adapted)) > 1e-2
    assert reread.dtype == torch.float32 and type(reread) is type(frozen)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == load_file(tmp_path / "backbone" / "model.safetensors").keys()
    head, embeddings = reread.get_output_embeddings(), reread.get_input_embeddings()
    assert (head.weight is embeddings.weight) == tied
    assert torch.equal(head.weight, frozen.get_output_embeddings().weight), "the head was never merged into"
    text = "two words, Ω"
    assert AutoTokenizer.from_pretrained(folder).encode(text) == byte_tokenizer().encode(text)


@pytest.mark.usefixtures("quiet_bitsandbytes")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_onto_either_base(tmp_path, quantization, dtype):
    """`dequantised` is the model that was trained; `original` has the adapter on weights it has not seen.

    In train mode, since in eval mode int8 layers round activations to 8 bits as well, which no plain model does.

    In bf16 every merged weight and every product is rounded to 8 bits (4e-3), three layers deep; the adapted model
    has as many roundings of its own, so that their distance stays below 5e-2 where the two bases are 0.1 apart.
    """
    run, recipe, adapted = untrained_run(
        tmp_path, model=WIDE, backbone={"quantization": quantization, "dtype": dtype}, adapter={"rank": 4}
    )
    logits = {}
    for merge_base in ("original", "dequantised"):
        folder = export(run, "merged", QUIET, out=tmp_path / merge_base, merge_base=merge_base)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
        assert {str(w.dtype) for w in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
        assert f"merged onto the {merge_base} weights" in (folder / "README.md").read_text()
        logits[merge_base] = logits_of(model)
    plain = load_backbone(recipe.backbone.model_copy(update={"quantization": "none"}), CPU)
    load_adapter(run / "adapter", plain, CPU)
    bound = FLOAT32 if dtype == "float32" else 5e-2
    adapted.train()
    errors = relative(logits["dequantised"], logits_of(adapted)), relative(logits["original"], logits_of(plain))
    apart = relative(logits["original"], logits["dequantised"])
    print(quantization, dtype, f"dequantised {errors[0]:.1e}, original {errors[1]:.1e}, bases apart {apart:.1e}")
    assert max(errors) < bound
    if quantization == "nf4":
        assert apart > 2 * bound
