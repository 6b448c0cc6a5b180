"""A backbone that one process holds whole: the bits that transformers loads, without its memory."""

import errno
import json
import logging
import shutil
import sys
from typing import Any

import huggingface_hub
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaForCausalLM, MixtralConfig

import metatt_scale.backbone.checkpoint as checkpoint_module
from metatt_scale.backbone import load_backbone
from metatt_scale.backbone.checkpoint import NotByLayers, fetch
from metatt_scale.backbone.source import Source
from metatt_scale.benchmark.memory import held_bytes, peak_bytes
from metatt_scale.plan.shape import read_shape
from metatt_scale.plan.weights import loading_bytes
from metatt_scale.recipe import validate
from tests.backbones import load, recipe_of
from tests.quantised import quantise, same_bits, snapshot, wide_model
from tests.tiny import MODELS, tiny_model
from tests.toy import CPU

pytestmark = pytest.mark.usefixtures("quiet_bitsandbytes")
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97, "pad_token_id": 0}
_GQA = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
PECULIAR = {
    # weights that the class draws outside of any device's context
    "diffllama": _GQA,
    # buffers of the layers that the root sets
    "falcon_h1": {**_GQA, **_MAMBA, "head_dim": 8},
    # layers that share weights
    "zamba2": {**_GQA, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 4}
    | {"mamba_d_state": 8, "attention_head_dim": 16, "num_mem_blocks": 1, "adapter_rank": 8},
    # weights that stay in float32
    "rwkv": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    # a module that initialises the linears below it
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64},
}


def by_transformers(path, dtype="float32", **options):
    auto = AutoModelForMaskedLM if AutoConfig.from_pretrained(path).model_type in ("bert", "roberta") else None
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, **options}
    return (auto or AutoModelForCausalLM).from_pretrained(path, **options)


def check_same(model, expected):
    """Every bit of the state, of buffers that no file holds, and of what the model says about itself."""
    got, wanted = ({**m.state_dict(), **dict(m.named_buffers())} for m in (model, expected))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(as_bytes(got[name]), as_bytes(value)), name
    assert dict(model.named_parameters()).keys() == dict(expected.named_parameters()).keys(), "other weights are tied"
    assert model.config.to_dict() == expected.config.to_dict()
    one, other = (getattr(m, "generation_config", None) for m in (model, expected))
    assert (one and one.to_dict()) == (other and other.to_dict())


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder behind a hub id; what is asked for is copied to a cache."""
    folder, cache = tmp_path / "hub", tmp_path / "cache"
    tiny_model("llama").save_pretrained(folder)

    def download(repo, *, revision, allow_patterns):
        cache.mkdir(exist_ok=True)
        for file in [file for pattern in allow_patterns for file in folder.glob(pattern)]:
            shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*MODELS, "tied llama"])
def test_the_bits_of_transformers(name, dtype, tmp_path):
    """From many files, in the files' own type and in another one."""
    tied = {"tie_word_embeddings": True} if name.startswith("tied") else {}
    tiny_model(name.removeprefix("tied "), **tied).save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_same(load(tmp_path, dtype=dtype), by_transformers(tmp_path, dtype))


@pytest.mark.parametrize("name", PECULIAR)
def test_the_bits_of_transformers_for_classes_with_a_way_of_their_own(name, tmp_path):
    config = AutoConfig.for_model(name, **PECULIAR[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    expected = by_transformers(tmp_path, "float16", attn_implementation="eager")
    check_same(load(tmp_path, dtype="float16", attention="eager"), expected)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen2", "gpt_bigcode"])
def test_packed_is_what_transformers_loads_packed(name, quantization, tmp_path):
    if name in PECULIAR:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **PECULIAR[name]), dtype=torch.float32)
    else:
        model = wide_model(name)
    model.save_pretrained(tmp_path)
    expected = by_transformers(tmp_path, "bfloat16")
    quantise(expected, recipe_of("unused", dtype="bfloat16", quantization=quantization))
    assert same_bits(load(tmp_path, dtype="bfloat16", quantization=quantization), snapshot(expected))


# ---- memory


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_host_holds_what_stays_and_about_two_layers(quantization, dtype, device, tmp_path, monkeypatch):
    """As `plan` says. Files are in float32. The meta device stands for an accelerator: the host has nothing of it."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads hold is not counted
    monkeypatch.setattr(functional, "name2qmap", {})  # it keeps a table on the device that asked first
    tiny_model("qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=12).save_pretrained(
        tmp_path, max_shard_size="200kB"
    )
    mapped = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    models: list[Any] = []

    def act():
        recipe = recipe_of(tmp_path, dtype=dtype, quantization=quantization, quant_storage=dtype)
        try:
            models.append(load_backbone(recipe, torch.device(device)))
        except AssertionError as error:
            assert device == "meta" and "never filled" in str(error)

    peak = peak_bytes(act, CPU)
    backbone = {"path": str(tmp_path), "dtype": dtype}
    recipe = validate({"output_dir": "unused", "backbone": backbone, "data": {"train": [{"path": "unused"}]}}, "test")
    two_layers = loading_bytes(read_shape(recipe), recipe.backbone)
    stays = sum(held_bytes(tensors_of(model)) for model in models)
    print(f"files {mapped:,} peak without them {peak - mapped:,} stays {stays:,} two layers {two_layers:,}")
    assert peak - mapped - stays < two_layers


def tensors_of(model):
    """All tensors of a model, with those that 4-bit linears keep beside their weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if state := getattr(module, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_overwritten_in_place_changes_no_loaded_model(quantization, dtype, tmp_path):
    """With biases, and in the files' own type, where a tensor could stay in its file."""
    wide_model("qwen2", getattr(torch, dtype)).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=dtype, quantization=quantization)
    before = snapshot(model)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as open_file:
        open_file.write(b"\xff" * file.stat().st_size)
    assert same_bits(model, before)


# ---- what only transformers can load


def test_an_older_form_is_loaded_by_transformers_and_one_line_says_so(tmp_path, caplog):
    experts = MixtralConfig(**{**MODELS["mistral"][1], "num_local_experts": 2, "num_experts_per_tok": 1})
    model: Any = AutoModelForCausalLM.from_config(experts)
    model.save_pretrained(tmp_path / "old")
    check_same(load(tmp_path / "old"), by_transformers(tmp_path / "old"))
    (record,) = (record for record in caplog.records if record.name.startswith("metatt_scale"))
    text = record.getMessage()
    assert record.levelno == logging.WARNING and str(tmp_path / "old") in text and "\n" not in text
    assert "save_original_format=False" in text
    caplog.clear()
    model.save_pretrained(tmp_path / "new", save_original_format=False)  # the remedy
    check_same(load(tmp_path / "new"), by_transformers(tmp_path / "new"))
    assert not [record for record in caplog.records if record.name.startswith("metatt_scale")]


def test_tied_weights_that_differ_are_loaded_as_transformers_does(tmp_path, caplog):
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded: Any = load(tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    check_same(loaded, by_transformers(tmp_path))
    assert "tie_word_embeddings" in caplog.text


def test_code_beside_the_weights_is_loaded_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "own"
    tiny_model("llama").save_pretrained(folder)
    code = """
from transformers import LlamaConfig, LlamaForCausalLM

class C(LlamaConfig):
    model_type = "strange"

class M(LlamaForCausalLM):
    config_class = C

    def _init_weights(self, module):  # in the manner of older code: what is loaded would be lost
        super()._init_weights(module)
        if hasattr(module, "q_proj"):
            module.q_proj.weight.data.normal_()
"""
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange"}
    config |= {"auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "M" and type(model).__module__.startswith("transformers_modules")
    expected = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    check_same(model, expected)


def test_code_of_the_hub_is_that_of_the_revision(hub, monkeypatch):
    asked = {}

    def dynamic(reference, repo, **options):
        asked.update(options, repo=repo)
        return LlamaForCausalLM

    config = AutoConfig.from_pretrained(hub)
    config.auto_map, config._name_or_path = {"AutoModelForCausalLM": "a/b--modeling_own.M"}, "a/b"
    monkeypatch.setattr("transformers.models.auto.auto_factory.get_class_from_dynamic_module", dynamic)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(LlamaForCausalLM, "_auto_class", None)
    load("a/b", trust_remote_code=True, revision="abc")
    assert (asked["repo"], asked["code_revision"]) == ("a/b", "abc")


def test_how_to_generate_is_read_from_an_old_config_too(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"temperature": 0.3, "do_sample": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    model: Any = load(tmp_path)
    assert model.generation_config.temperature == 0.3
    check_same(model, by_transformers(tmp_path))


# ---- the hub


def fetched():
    return fetch(recipe_of("a/b"), Source(kind="hub", location="a/b"))


def test_the_hub_gives_files_under_names_of_their_own(hub):
    index = {"weight_map": dict.fromkeys(load_file(hub / "model.safetensors"), "part.safetensors")}
    (hub / "model.safetensors").rename(hub / "part.safetensors")
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (fetched() / "part.safetensors").is_file()


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub, monkeypatch):
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(checkpoint_module, "FileLock", refuse)
    assert (fetched() / "model.safetensors").is_file()


def test_a_hub_id_without_safetensors_is_left_to_transformers(hub):
    """It knows the copies that the hub's converter has proposed."""
    (hub / "model.safetensors").unlink()
    with pytest.raises(NotByLayers):
        fetched()
