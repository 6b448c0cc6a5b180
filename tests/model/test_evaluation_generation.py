"""Answers that a tiny random Llama writes: the questions of LLM-Adapters, and generation in batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from metatt_scale.data.templates import llm_adapters_prompt
from metatt_scale.evaluation import evaluate
from metatt_scale.evaluation.generate import continue_tokens, generate
from metatt_scale.evaluation.llm_adapters import MAX_NEW_TOKENS, extract_answer
from metatt_scale.parallel import World
from tests.questions import recipe, sentence, write
from tests.toy import CPU

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def instructions(tmp_path: Path) -> Iterator[Path]:
    rng = random.Random(1)
    records = [
        {"instruction": sentence(rng) * (1 + i), "input": "", "answer": f"answer{1 + i % 4}", "source": "x"}
        for i in range(6)
    ]  # fmt: skip
    write(tmp_path / "arc_easy.jsonl", records)
    yield tmp_path


def test_llm_adapters(
    byte_llama: Any, byte_bpe: Any, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metatt_scale.evaluation.llm_adapters as module

    calls: list[int] = []

    def answering(
        model: Any, tokenizer: Any, prompts: list[list[int]], device: torch.device, n: int, in_step: bool
    ) -> list[str]:
        """Says "answer1" to all questions but the shortest, to which it says nothing of use."""
        calls.append(len(prompts))
        assert (device, n) == (CPU, MAX_NEW_TOKENS) and not in_step
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        assert all("### Response:" in text for text in texts)
        return ["hm" if len(text) == min(map(len, everything)) else "the answer1" for text in texts]

    lines = (instructions / "arc_easy.jsonl").read_text().splitlines()
    everything = [llm_adapters_prompt(json.loads(line)["instruction"], "") for line in lines]
    monkeypatch.setattr(module, "continue_tokens", answering)
    settings = recipe(instructions, "llm_adapters/arc_easy", batch_size=4)
    results = tmp_path / "r.json"
    scores = evaluate(byte_llama, byte_bpe, settings, results, "tuned", "f", world=World(device=CPU))
    score = scores["llm_adapters/arc_easy"]
    shortest = min(range(6), key=lambda i: len(everything[i]))
    right = "".join(str(int(i % 4 == 0 and i != shortest)) for i in range(6))
    assert score.samples == {"acc": right, "unparsable": "".join(str(int(i == shortest)) for i in range(6))}
    assert calls == [4, 2]
    assert evaluate(byte_llama, byte_bpe, settings, results, "tuned", "f", world=World(device=CPU)) == scores
    assert calls == [4, 2]
    evaluate(byte_llama, byte_bpe, settings, results, "tuned", "g", world=World(device=CPU))
    assert calls == [4, 2, 4, 2]


def test_llm_adapters_bad_records(byte_llama: Any, byte_bpe: Any, tmp_path: Path) -> None:
    settings = recipe(tmp_path, "llm_adapters/piqa")
    for bad in ({"instruction": "a", "answer": "b"}, {"instruction": "a"}, {"instruction": 1, "answer": "true"}):
        write(tmp_path / "piqa.jsonl", [bad])
        with pytest.raises(ValueError, match=r"piqa\.jsonl:1"):
            evaluate(byte_llama, byte_bpe, settings, tmp_path / "r.json", "tuned", "f", world=World(device=CPU))


def test_batched_generation_is_that_of_single_prompts(byte_llama: LlamaForCausalLM, byte_bpe: Any) -> None:
    byte_llama.train()
    prompts = ["a bird", "the stone was very red", "x"]
    ids = [byte_bpe(prompt)["input_ids"] for prompt in prompts]
    together = continue_tokens(byte_llama, byte_bpe, ids, CPU, 6)
    assert together == [generate(byte_llama, byte_bpe, prompt, CPU, 6) for prompt in prompts]
    assert byte_llama.training
    byte_llama.eval()
    # Greedy decoding by hand, without a cache.
    tokens = list(ids[1])
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(byte_llama(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert together[1] == byte_bpe.decode(tokens[len(ids[1]) :], skip_special_tokens=True)
    assert extract_answer(together[0], ("solution1",)) is None
    with pytest.raises(ValueError, match="empty"):
        generate(byte_llama, byte_bpe, "", CPU, 3)
    with pytest.raises(ValueError, match="temperature"):
        generate(byte_llama, byte_bpe, "a", CPU, 3, temperature=-1)
    assert isinstance(generate(byte_llama, byte_bpe, "a", CPU, 3, temperature=0.7), str)
