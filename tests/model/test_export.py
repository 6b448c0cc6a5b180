"""Exports, loaded by who will read them: PEFT, plain transformers, and our own reader."""

import json
import logging
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BitsAndBytesConfig

from metatt_scale.adapter import inject, load_adapter, save_adapter
from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.evaluation import TaskScore
from metatt_scale.evaluation.scores import Key, record
from metatt_scale.export import export
from metatt_scale.files import sha256, write_text
from metatt_scale.recipe import dump_recipe, validate
from metatt_scale.reopen import fingerprint, read_recipe
from metatt_scale.training import train
from tests.tiny import FLOAT32, MODELS, randomise, tiny_model, tokens

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # whole 64-blocks: 4-bit storage on a CPU needs them


@pytest.fixture(autouse=True)
def _quiet_libraries(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("METATT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
        # PEFT asks transformers under the name that transformers is giving up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def save_backbone(folder, name="llama", **changes):
    changes = {"vocab_size": 300, **changes}
    tiny_model(name, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(tmp_path, backbone=None, adapter=None, **training):
    data = tmp_path / "sums.jsonl"
    lines = [{"instruction": f"{a}+{b}", "input": "", "output": f"={a + b}"} for a in range(6) for b in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return validate(
        {
            "output_dir": str(tmp_path / "run"),
            "backbone": {"path": str(tmp_path / "backbone"), "dtype": "float32", **(backbone or {})},
            "adapter": {"rank": [3, 4, 5], "alpha": 1.5, **(adapter or {})},
            "data": {"train": [{"path": str(data)}], "template": "plain"},
            "training": {"batch_size": 12, "micro_batch_size": 12, "learning_rate": 0.02, "max_steps": 4, **training},
        },
        "test",
    )


def untrained_run(tmp_path, name="llama", model=None, backbone=None, adapter=None):
    """A run directory as `train` leaves it, its cores random: (run directory, recipe, model with the adapter)."""
    save_backbone(tmp_path / "backbone", name, **(model or {}))
    recipe = recipe_of(tmp_path, backbone, adapter)
    adapted = load_backbone(recipe.backbone, CPU)
    chain = inject(adapted, recipe.adapter, 0)
    randomise(chain)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    about = {"base_model": recipe.backbone.path, "kind": recipe.adapter.kind, "step": 4, "target_tokens": 1234}
    about |= {"records": [s.path for s in recipe.data.train], "recipe": recipe.model_dump(mode="json")}
    save_adapter(run / "adapter", chain, {**about, "metatt_scale": "0"})
    write_text(run / "recipe.yaml", dump_recipe(recipe))
    return run, recipe, adapted


def logits_of(model, ids=None):
    with torch.no_grad():
        return model(tokens(vocab=97) if ids is None else ids).logits.float()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of a few steps on a tiny saved model in float32: (folder around it, TrainedRun, recipe)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("trained")
        save_backbone(folder / "backbone")
        recipe = recipe_of(folder, adapter={"target_modules": ["q_proj", "k_proj", "down_proj"]})
        run = train(recipe, QUIET)
    run.model.eval()
    return folder, run, recipe


# ---- LoRA, read by PEFT


def check_lora(run, base, ours, bound=FLOAT32):
    """PEFT on `base` gives the logits `ours`, also merged; returns the relative differences."""
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
    assert max(errors) < bound
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


def test_lora_of_a_trained_run(trained):
    folder, run, _ = trained
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
    load_adapter(run / "adapter", wide)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    check_lora(run, base, logits_of(wide))


# ---- merged, read by plain transformers


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
    load_adapter(run / "adapter", plain)
    bound = FLOAT32 if dtype == "float32" else 5e-2
    adapted.train()
    errors = relative(logits["dequantised"], logits_of(adapted)), relative(logits["original"], logits_of(plain))
    apart = relative(logits["original"], logits["dequantised"])
    print(quantization, dtype, f"dequantised {errors[0]:.1e}, original {errors[1]:.1e}, bases apart {apart:.1e}")
    assert max(errors) < bound
    if quantization == "nf4":
        assert apart > 2 * bound


# ---- the cores, read by ourselves


def test_metatt_gives_the_same_bits(trained):
    folder, run, recipe = trained
    target = export(run.folder, "metatt", QUIET)
    fresh = load_backbone(recipe.backbone, CPU)
    frozen = logits_of(fresh)
    adapter = load_adapter(target, fresh)
    assert torch.equal(logits_of(fresh), logits_of(run.model)) and not torch.equal(logits_of(fresh), frozen)
    assert all(torch.equal(a, b) for a, b in zip(adapter.cores, run.adapter.cores, strict=True))
    # An export is itself something to export from.
    again = export(target, "lora", QUIET, out=folder / "again")
    first = load_file(export(run.folder, "lora", QUIET, replace=True) / "adapter_model.safetensors")
    second = load_file(again / "adapter_model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def test_another_place_of_the_backbone(trained, tmp_path):
    _, run, _ = trained
    moved = tmp_path / "elsewhere"
    save_backbone(moved)
    merged = export(run.folder, "merged", QUIET, out=tmp_path / "m", backbone={"path": str(moved)})
    assert relative(logits_of(AutoModelForCausalLM.from_pretrained(merged)), logits_of(run.model)) < FLOAT32
    other = save_backbone(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match="load it on the backbone it was trained on"):
        export(run.folder, "merged", QUIET, out=tmp_path / "n", backbone={"path": str(other)})
    assert not (tmp_path / "n").exists()


# ---- card, refusals


def test_the_card_says_where_the_model_comes_from(trained, tmp_path):
    folder, run, _ = trained
    without = export(run.folder, "metatt", QUIET, out=tmp_path / "without")
    assert "No scores on record" in (without / "README.md").read_text()
    description, recipe = read_recipe(run.folder / "adapter")
    samples = {"acc": "1101", "acc_norm": "1000"}
    for task, adapter in (("boolq", description["weights_sha256"]), ("piqa", "of another adapter")):
        key: Key = {"fingerprint": fingerprint(recipe, adapter)}
        score = TaskScore(metric="acc", samples=samples, key=key, seconds=1.0)
        record(run.folder / "results.json", "fine_tuned", task, score)
    try:
        for to in ("lora", "merged", "metatt"):
            card = (export(run.folder, to, QUIET, out=tmp_path / to) / "README.md").read_text()
            assert f'base_model: "{folder / "backbone"}"\n' in card
            assert "input 48 x layer 3 x projection 3 x output 32; ranks 3, 4, 5; alpha 1.5" in card
            count = 48 * 3 + 3 * 3 * 4 + 4 * 3 * 5 + 5 * 32
            assert f"| trained parameters | {count:,} |" in card
            assert "| adapted modules | 9 (" in card and "self_attn.q_proj" in card and "mlp.down_proj" in card
            assert str(folder / "sums.jsonl") in card and "4 steps of 12 examples, learning rate 0.02" in card
            assert "| fine_tuned | boolq | acc | 0.7500 | 0.2500 | 4 |" in card
            assert "| fine_tuned | boolq | acc_norm | 0.2500 | 0.2500 | 4 |" in card
            assert "piqa" not in card  # scored before the adapter was trained anew
    finally:
        (run.folder / "results.json").unlink()


def contents(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_existing_target_is_kept_unless_it_may_be_replaced(trained, tmp_path):
    _, run, _ = trained
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for to in ("lora", "merged", "metatt"):
        with pytest.raises(FileExistsError, match=r"exists already; remove it, choose --out, or pass --replace"):
            export(run.folder, to, QUIET, out=target)
        assert contents(target) == {"mine.txt": b"mine"}
        with pytest.raises(FileExistsError, match="no export of this toolkit"):
            export(run.folder, to, QUIET, out=target, replace=True)
        with pytest.raises(FileExistsError, match="no export of this toolkit"):
            export(run.folder, to, QUIET, out=run.folder, replace=True)
    assert contents(target) == {"mine.txt": b"mine"}
    target = export(run.folder, "metatt", QUIET, out=tmp_path / "export")
    export(run.folder, "lora", QUIET, out=target, replace=True)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "metatt_export.json"}
    assert set(contents(target)) == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "there"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failing_export_leaves_nothing_and_takes_nothing(tmp_path, replace):
    save_backbone(tmp_path / "backbone")
    recipe = recipe_of(tmp_path)
    model = load_backbone(recipe.backbone, CPU)
    adapter = inject(model, recipe.adapter, 0)
    randomise(adapter)
    with torch.no_grad():
        adapter.cores[0][0, 0, 0] = math.inf
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    about = {"base_model": "b", "kind": "metatt_4d", "step": 1, "target_tokens": 1, "records": []}
    save_adapter(
        tmp_path / "run" / "adapter",
        adapter,
        {**about, "recipe": recipe.model_dump(mode="json"), "metatt_scale": "0"},
    )
    place = tmp_path / "place"
    if replace:
        (place / "there").mkdir(parents=True)
        (place / "there" / "metatt_export.json").write_text("mine")
    with pytest.raises(ValueError, match="not finite; nothing was merged"):
        export(tmp_path / "run", "merged", QUIET, out=place / "there", replace=replace)
    assert contents(place) == ({"there/metatt_export.json": b"mine"} if replace else {})
    assert [p.name for p in place.iterdir()] == (["there"] if replace else [])


def test_what_cannot_be_exported(tmp_path, trained):
    _, run, _ = trained
    with pytest.raises(ValueError, match="choose one of lora, merged, metatt"):
        export(run.folder, "onnx", QUIET)
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nowhere", "lora", QUIET)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not finished"):
        export(tmp_path / "unfinished", "lora", QUIET)


def test_an_adapter_cannot_ask_for_remote_code(trained, tmp_path):
    """Its own word does not count; only the person who opens it may allow it."""
    _, run, _ = trained
    folder = tmp_path / "adapter"
    shutil.copytree(run.folder / "adapter", folder)
    description = json.loads((folder / "metatt.json").read_text())
    description["recipe"]["backbone"]["trust_remote_code"] = True
    (folder / "metatt.json").write_text(json.dumps(description))
    assert not read_recipe(folder)[1].backbone.trust_remote_code
    assert read_recipe(folder, {"trust_remote_code": True})[1].backbone.trust_remote_code


def test_factors_that_are_not_finite_are_not_exported(tmp_path):
    run, _, _ = untrained_run(tmp_path)
    folder = run / "adapter"
    cores = load_file(folder / "metatt.safetensors")
    cores["core_0"][0, 0, 0] = math.nan
    save_file(cores, folder / "metatt.safetensors")
    description = json.loads((folder / "metatt.json").read_text())
    description["weights_sha256"] = sha256(folder / "metatt.safetensors")
    (folder / "metatt.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"lora_A\.weight is not finite; the adapter's tensors or head"):
        export(run, "lora", QUIET)
