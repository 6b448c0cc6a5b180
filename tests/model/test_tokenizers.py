"""Tokenizers beside a backbone's weights, and that of bytes where there is none."""

import json

import pytest

from metatt_scale.backbone import byte_tokenizer, load_tokenizer
from tests.backbones import recipe_of


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


def test_a_folder_without_a_tokenizer(copied_llama, saved_llama, tmp_path):
    assert load_tokenizer(recipe_of(saved_llama)).encode("é") == byte_tokenizer().encode("é")
    assert load_tokenizer(recipe_of(f"random:{saved_llama}")).eos_token == "<eos>"
    for file in copied_llama.glob("token*"):
        file.unlink()
    assert len(load_tokenizer(recipe_of(f"random:{copied_llama}"))) == 258
    with pytest.raises(
        ValueError, match=r"the tokenizer cannot be loaded.*put its tokenizer\.json beside the weights"
    ):
        load_tokenizer(recipe_of(copied_llama))


def test_padding_falls_back_to_the_end_of_text(copied_llama):
    file = copied_llama / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    assert load_tokenizer(recipe_of(copied_llama)).pad_token_id == 1
