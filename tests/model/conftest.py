"""What tests of tiny models share."""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from metatt_scale.backbone import byte_tokenizer
from metatt_scale.recipe import dump_recipe
from metatt_scale.training import train
from tests.exports import QUIET, recipe_of, save_backbone
from tests.tiny import tiny_model
from tests.toy import toy_recipe, write_toy

# Tiny models compute faster on one thread, and much faster where the machine has other work.
torch.set_num_threads(1)


@pytest.fixture
def quiet_bitsandbytes():
    """bitsandbytes logs (not warns) what kernels it lacks; its CPU path for int8 warns of the type it computes in."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub refuses every data set."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory):
    """A folder as save_pretrained writes it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    tiny_model("llama", vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied_llama(saved_llama, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(saved_llama, tmp_path / "copy"))


@pytest.fixture(scope="module")
def byte_bpe() -> PreTrainedTokenizerFast:
    """A token per byte, in the form of a published tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def byte_llama(byte_bpe: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random model with positions enough for every question."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_bpe), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A real run of a few steps on a tiny saved model in float32: (folder around it, TrainedRun, recipe)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("trained")
        save_backbone(folder / "backbone")
        recipe = recipe_of(folder, adapter={"target_modules": ["q_proj", "k_proj", "down_proj"]})
        run = train(recipe, QUIET)
    run.model.eval()
    return folder, run, recipe


@pytest.fixture
def recipe_file(tmp_path):
    """The toy recipe as a file, with its model and records beside it."""
    write_toy(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(toy_recipe(tmp_path)))
    return file
