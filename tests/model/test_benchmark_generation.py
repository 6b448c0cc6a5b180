"""The benchmark table of generation. No test asserts seconds."""

import pytest
import torch

from metatt_scale.backbone import load_backbone
from metatt_scale.benchmark import generation
from metatt_scale.benchmark.arms import random_batch
from metatt_scale.cli import main
from metatt_scale.recipe import dump_recipe
from tests.benchmark import BACKBONES, PEFT_WARNINGS, run
from tests.tiny import WIDE
from tests.toy import CPU, GPT2, LLAMA, toy_recipe, write_toy

pytestmark = PEFT_WARNINGS
GENERATION = ("--table", "generation", "--examples", "3", "--length", "6", "--new-tokens", "5", "--repeats", "2")


def test_table_of_generation(recipe_file, capsys, monkeypatch):
    calls = []
    real = generation.continue_greedily

    def count(model, prompts_BS, new_tokens):
        tokens_BN = real(model, prompts_BS, new_tokens)
        calls.append((model.training, tuple(prompts_BS.shape), tuple(tokens_BN.shape)))
        return tokens_BN

    monkeypatch.setattr(generation, "continue_greedily", count)
    report = run(recipe_file, *GENERATION, "--ranks", "4,64")
    text = capsys.readouterr()
    assert "/ base" in text.out and "merging dequantises" not in text.out and text.err == ""
    rows = {row["arm"]: row for row in report["rows"]}
    chains = [f"MetaTT-4D r={rank}, {form}" for rank in (4, 64) for form in ("merged", "unmerged")]
    assert list(rows) == ["base", *chains, "LoRA r=8, unmerged"]
    # Folded at rank 4; at 64 the products of this narrow model would take more than their part of the memory.
    assert [rows[name]["order"] for name in chains] == ["merged", "folded", "merged", "thin"]
    assert calls == [(False, (3, 6), (3, 5))] * 6 * (2 + 2)
    for row in rows.values():
        assert (
            row["tokens_per_second"] == [pytest.approx(15 / s) for s in row["seconds"]] and len(row["seconds"]) == 2
        )
    assert rows["base"]["rate_ratio"] == {"median": 1, "smallest": 1, "largest": 1}
    assert all(rows[name]["same_tokens"] and rows[name]["prompts_as_base"] < 3 for name in chains)
    assert {rows[name]["same_tokens"] for name in ("base", "LoRA r=8, unmerged")} == {None}


@pytest.mark.parametrize("backbone", BACKBONES[1:], ids=["nf4", "int8"])
def test_generation_says_what_merging_does_to_packed_weights(tmp_path, recipe_file, backbone, capsys):
    write_toy(tmp_path, config={**LLAMA, **WIDE})
    recipe_file.write_text(dump_recipe(toy_recipe(tmp_path, backbone={**backbone, "gradient_checkpointing": True})))
    report = run(recipe_file, *GENERATION, "--ranks", "4")
    said = f"the backbone is {backbone['quantization']}, and merging dequantises"
    assert said in capsys.readouterr().out and "no checkpointing" in report["title"]
    assert [row["arm"] for row in report["rows"]][3:] == ["LoRA r=8, unmerged", "LoRA r=8 in bfloat16, unmerged"]


def test_generation_goes_on_after_the_end_of_text(tmp_path):
    model = load_backbone(toy_recipe(tmp_path).backbone, CPU, 0)
    prompts_BS = random_batch(model, 2, 6).input_ids_BS
    first_B = generation.continue_greedily(model, prompts_BS, 4)[:, 0]
    # What the model would write first now ends a text; sampling, which a checkpoint may ask for, is not done either.
    model.generation_config.eos_token_id, model.generation_config.do_sample = first_B.tolist(), True
    tokens_BN = generation.continue_greedily(model, prompts_BS, 4)
    assert tokens_BN.shape == (2, 4) and not torch.isin(tokens_BN, first_B).any()
    assert torch.equal(tokens_BN, generation.continue_greedily(model, prompts_BS, 4))


@pytest.mark.parametrize(
    "config, says",
    [
        (GPT2, "--length 60 and --new-tokens 5 take 65 positions, but the model has 64"),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300},
            "cannot generate; --table generation needs a causal model",
        ),
    ],
)
def test_generation_refuses_what_cannot_continue(tmp_path, recipe_file, config, says, capsys):
    write_toy(tmp_path, config=config)
    assert main(["benchmark", str(recipe_file), *GENERATION, "--length", "60"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and output.err.count("\n") == 1
