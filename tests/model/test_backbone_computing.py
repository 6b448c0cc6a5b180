"""How a backbone computes: in the asked attention, and with its layers run twice."""

import pytest
import torch

from metatt_scale.adapter import inject
from metatt_scale.backbone import pick_attention
from metatt_scale.recipe import AdapterRecipe
from tests.backbones import load
from tests.tiny import FLOAT32, MODELS, randomise, tiny_model, tokens
from tests.toy import CPU


def test_attention_choice(saved_llama, monkeypatch):
    assert pick_attention("auto", CPU, "bfloat16") == "sdpa"
    assert pick_attention("eager", CPU, "bfloat16") == "eager"
    with pytest.raises(ValueError, match=r"flash-attn, a CUDA device.*use `auto` or `sdpa`"):
        load(saved_llama, attention="flash_attention_2")

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    cuda = torch.device("cuda", 0)
    assert pick_attention("auto", cuda, "bfloat16") == "flash_attention_2"
    assert pick_attention("auto", cuda, "float32") == "sdpa"  # flash-attn has 16-bit kernels only
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pick_attention("auto", cuda, "bfloat16") == "sdpa"


@pytest.mark.parametrize("path", ["folder", "random"])
def test_eager_and_sdpa_agree(saved_llama, path):
    ids = tokens()
    logits = {}
    for attention in ("eager", "sdpa", "auto"):
        model = load(saved_llama if path == "folder" else f"random:{saved_llama}", attention=attention)
        assert model.config._attn_implementation == ("sdpa" if attention == "auto" else attention)
        logits[attention] = model(ids).logits
    assert torch.equal(logits["auto"], logits["sdpa"])
    assert (logits["eager"] - logits["sdpa"]).norm() < FLOAT32 * logits["sdpa"].norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "opt", "roberta"])
def test_checkpointing_runs_every_layer_twice_and_keeps_the_gradients(tmp_path, name):
    """The reentrant kind would leave the cores without a gradient: no input of the first layer asks for one.

    In roberta, query and value read a layer's very input, the same tensor in the recomputation as in the forward.
    """
    tiny_model(name).save_pretrained(tmp_path)
    runs, gradients = {}, {}
    for wanted in (False, True):
        model = load(tmp_path, gradient_checkpointing=wanted).train()
        adapter = inject(model, AdapterRecipe(rank=3, target_modules=tuple(MODELS[name][2])), 0, CPU)
        randomise(adapter)
        runs[wanted] = []
        for linear in adapter.linears:
            linear.base_layer.register_forward_hook(lambda *_, seen=runs[wanted]: seen.append(1))
        model(tokens(), **({} if name == "roberta" else {"use_cache": False})).logits.square().sum().backward()
        adapter.pull_back()
        gradients[wanted] = [core.grad for core in adapter.cores]
    assert len(runs[True]) == 2 * len(runs[False]) > 0
    assert all(g is not None and torch.equal(g, h) for g, h in zip(gradients[True], gradients[False], strict=True))
