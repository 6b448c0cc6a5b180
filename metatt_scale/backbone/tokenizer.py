"""The tokenizer beside the model, or a byte-level one for random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from metatt_scale.backbone.source import resolve, why_not
from metatt_scale.recipe import BackboneRecipe


def load_tokenizer(recipe: BackboneRecipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside the model; random weights without one get a byte-level tokenizer.

    Raises:
        ValueError: no tokenizer can be loaded.
    """
    source = resolve(recipe.path)
    location = Path(source.location)
    if source.kind == "random" and not (location.is_dir() and (location / "tokenizer.json").is_file()):
        return byte_tokenizer()
    options: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    loader: Any = AutoTokenizer
    if source.gguf_file:
        # What AutoTokenizer ends with for a GGUF file, without its seconds of parsing the model's configuration.
        loader, options = PreTrainedTokenizerFast, {"gguf_file": source.gguf_file}
    elif recipe.revision:
        options["revision"] = recipe.revision
    try:
        tokenizer = loader.from_pretrained(source.location, **options)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parsing ran into, even a bare Exception
        raise ValueError(why_not(recipe.path, source, error, "tokenizer")) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose 256 + 2 tokens are bytes, padding and end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
