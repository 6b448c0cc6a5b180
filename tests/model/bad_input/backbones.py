"""Backbones that are not there, are damaged, or do not fit."""

import json
import shutil

from tests.model.bad_input.cases import case, cases, cut, put, train, without
from tests.toy import GPT2, LLAMA


def backbone(make):
    """A case whose backbone.path is what `make(folder)` returns."""
    return lambda folder: train(folder, backbone={"path": make(folder)})


def config(content):
    """`random:` on a folder whose config.json is this."""

    def make(folder):
        (folder / "other").mkdir()
        (folder / "other" / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return f"random:{folder / 'other'}"

    return backbone(make)


def model_folder(*damages):
    """A saved model (from the module's finished run) with damage done to it."""

    def make(folder):
        target = folder / "saved"
        shutil.copytree(folder.parent / "model_on_disk", target)
        for damage in damages:
            damage(target)
        return str(target)

    return backbone(make)


BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300}
VISION = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
cases(
    lambda make: make,
    [
        ("no such folder", (backbone(lambda folder: str(folder / "none")),), "no such folder"),
        ("path is a file", (backbone(lambda folder: str(folder / "model" / "config.json")),), "write random:"),
        ("gguf missing", (backbone(lambda folder: str(folder / "m.gguf")),), "no such GGUF file"),
        ("package missing", (backbone(lambda _: "package:no_such_package"),), "is not installed", "pip install"),
        ("package without model", (backbone(lambda _: "package:json"),), "expected one .gguf file"),
        ("package is nonsense", (backbone(lambda _: "package:a/b"),), "backbone.path", "package:a/b"),
        ("random unknown", (backbone(lambda _: "random:gpt5"),), "'random:gpt5'", "shipped architecture"),
        ("random empty folder", (backbone(lambda folder: f"random:{folder / 'run'}"),), "neither a config JSON"),
        ("config is broken", (config("{"),), "config.json: not a transformers config JSON"),
        ("config is a list", (config([1]),), "config.json: not a transformers config JSON"),
        ("config lacks model_type", (config({"hidden_size": 32}),), "config.json: not a transformers config JSON"),
        ("config of unknown type", (config({"model_type": "nope"}),), "config.json: not a transformers config JSON"),
        ("config with text for a number", (config({**LLAMA, "hidden_size": "big"}),), "config.json"),
        ("config of a vision model", (config(VISION),), "vit"),
        ("config of an encoder", (config(BERT),), "BertForMaskedLM is not a causal language model"),
        ("vocabulary too small", (config({**LLAMA, "vocab_size": 20}),), "has embeddings for 20 tokens only"),
        ("folder is empty", (backbone(lambda folder: str(folder / "run")),), "config.json"),
        ("folder without weights", (backbone(lambda folder: str(folder / "model")),), "no .safetensors file"),
        ("no tokenizer", (model_folder(without("tokenizer.json", "tokenizer_config.json")),), "tokenizer"),
        ("tokenizer broken", (model_folder(put("tokenizer.json", "{")),), "tokenizer"),
        ("tokenizer is garbage", (model_folder(put("tokenizer.json", "[1, 2]")),), "tokenizer"),
        ("weights cut short", (model_folder(cut("model.safetensors")),), "saved"),
        ("weights empty", (model_folder(cut("model.safetensors", 0)),), "saved"),
        ("weights missing", (model_folder(without("model.safetensors")),), ".safetensors"),
        ("model config broken", (model_folder(put("config.json", "{")),), "saved"),
    ],
)


@case("records longer than the positions", "learned 6 positions")
def _(folder):
    arguments = config({**GPT2, "n_positions": 6})(folder)
    return [*arguments, "adapter.target_modules=[c_attn]"]


@case("GPT-2 quantised", "no torch Linear inside its layers")
def _(folder):
    arguments = config(GPT2)(folder)
    return [*arguments, "adapter.target_modules=[c_attn]", "backbone.quantization=nf4"]


@case("plan matches nothing", "'qproj' matches no module")
def _(folder):
    return ["plan", *train(folder)[1:], "adapter.target_modules=[qproj]"]


@case("plan of nothing", "no such folder")
def _(folder):
    return ["plan", *train(folder)[1:], "backbone.path=/none/at/all"]
