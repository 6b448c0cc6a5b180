"""Backbones loaded layer by layer, for an engine that shards."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

import metatt_scale.backbone.loading as loading_module
import metatt_scale.backbone.units as units_module
from metatt_scale.backbone import find_units, load_backbone, load_skeleton
from tests.backbones import WEIGHT, load, recipe_of
from tests.tiny import MODELS, tiny_model, tokens
from tests.toy import CPU


class Watching:
    """An engine that leaves every unit whole, and sees what there is when it comes."""

    def __init__(self):
        self.seen, self.waiting, self.finished = [], None, False

    def shard(self, unit):
        assert not any(tensor.is_meta for tensor in [*unit.parameters(), *unit.buffers()])
        assert not any(parameter.requires_grad for parameter in unit.parameters())
        self.seen.append(unit)

    def finish(self, model):
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        self.finished = True


def state_of(model):
    return {**model.state_dict(), **dict(model.named_buffers())}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_gives_the_same_model(name, dtype, tmp_path):
    """Weights and buffers, also those that no file holds: rotary frequencies, positions, embedding scales."""
    tiny_model(name).save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for path in (tmp_path, f"random:{tmp_path}"):
        recipe, engine = recipe_of(path, dtype=dtype), Watching()
        model = load_backbone(recipe, CPU, seed=5, engine=engine)
        whole = load_backbone(recipe, CPU, seed=5)
        assert same(state_of(model), state_of(whole))
        assert engine.finished and len(engine.seen) >= 3 and not model.training
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)


def test_layers_are_filled_one_at_a_time(saved_llama):
    model = load_skeleton(recipe_of(saved_llama))
    units = [path for path, _ in find_units(model)]
    assert units == [f"model.layers.{k}" for k in range(3)] + ["model.embed_tokens", "lm_head"]
    with torch.device("meta"):
        tied = type(model)(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True}))
    assert [path for path, _ in find_units(tied)] == [f"model.layers.{k}" for k in range(3)]

    filled = []

    class Counting(Watching):
        def shard(self, unit):
            super().shard(unit)
            unit.to("meta")  # what an engine holds elsewhere
            filled.append(sum(not parameter.is_meta for parameter in skeleton[0].parameters()))

    skeleton = []
    original = units_module.bring_in

    def remember(model, *rest):
        skeleton.append(model)
        original(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading_module, "bring_in", remember)
        with pytest.raises(AssertionError, match="never filled"):  # these shards are really gone
            load_backbone(recipe_of(saved_llama), CPU, engine=Counting())
    assert filled == [0] * 5


def test_random_weights_leave_the_generator_alone_and_differ_by_module(saved_llama):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = load(f"random:{saved_llama}")
    assert torch.equal(torch.rand(3), expected)
    first, second = (model.get_parameter(WEIGHT.replace("1", str(k))) for k in (0, 1))
    assert not torch.equal(first, second) and 0.01 < float(first.std()) < 0.5


def test_names_of_older_files_are_understood(tmp_path, saved_llama):
    """Without the model's prefix, and LayerNorm's gamma and beta of old."""
    model = tiny_model("bert")
    weights = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): v for name, v in model.state_dict().items()}
    weights = {
        name.replace("LayerNorm.bias", "LayerNorm.beta").removeprefix("bert."): v for name, v in weights.items()
    }
    model.config.save_pretrained(tmp_path)
    save_file({name: v.clone() for name, v in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(state_of(load_backbone(recipe_of(tmp_path), CPU, engine=Watching())), state_of(model))


def test_what_cannot_be_loaded_layer_by_layer_is_refused(tmp_path, saved_llama, copied_llama):
    def refused(path, message, **changes):
        with pytest.raises(ValueError, match=message):
            load_backbone(recipe_of(path, **changes), CPU, engine=Watching())

    experts = MixtralConfig(**{**MODELS["mistral"][1], "num_local_experts": 2, "num_experts_per_tok": 1})
    AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "mixtral")
    refused(tmp_path / "mixtral", "block_sparse_moe.*save_original_format=False.*parallel.backbone: replicate")

    file = copied_llama / "model.safetensors"
    weights = load_file(file)
    (copied_llama / "config.json").write_text(
        json.dumps(json.loads((copied_llama / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    refused(copied_llama, r"lm_head.weight.*set tie_word_embeddings to false.*parallel.backbone: replicate")
    shutil.copy(saved_llama / "config.json", copied_llama)
    for change in ("absent", "other shape"):
        changed = {name: value for name, value in weights.items() if name != WEIGHT}
        save_file(changed | ({} if change == "absent" else {WEIGHT: torch.zeros(3, 3)}), file, {"format": "pt"})
        refused(copied_llama, f"the files lack {WEIGHT}")
    file.write_bytes(file.read_bytes()[:-100])
    refused(copied_llama, "cannot be loaded.*fetch it again")
    file.unlink()
    refused(copied_llama, r"no \.safetensors file.*convert them to safetensors")
    save_file(weights, tmp_path / "outside.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, os.path.relpath(tmp_path / "outside.safetensors", copied_llama))}
    (copied_llama / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copied_llama, "names the file '.*outside.safetensors', which is not in the folder")
    refused(saved_llama, "int8, whose layers keep their weights outside.*use nf4 or none", quantization="int8")
    for storage in ("uint8", "bfloat16"):
        remedy = rf"quant_storage is {storage}.*set backbone\.quant_storage: float32"
        refused(saved_llama, remedy, quantization="nf4", quant_storage=storage)


def test_an_encoder_without_its_head_gets_the_same_head_on_every_rank(tmp_path):
    model = tiny_model("roberta")
    model.roberta.save_pretrained(tmp_path)
    first, again = (load_backbone(recipe_of(tmp_path), CPU, seed=1, engine=Watching()) for _ in range(2))
    assert same(state_of(first), state_of(again))
    inner = "roberta.encoder.layer.1.output.dense.weight"
    assert torch.equal(first.get_parameter(inner), model.get_parameter(inner))
