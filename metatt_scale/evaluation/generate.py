"""Text from a loaded model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from metatt_scale.strict_json import is_unicode

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_COLDEST, _HOTTEST = 0.001, 100
"""Temperatures beyond which logits overflow in half precision, or every token is as likely as any other."""
_SHORTER = "shorten the prompt, or ask for fewer new tokens (--max-new-tokens): {positions} positions in all"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> str:
    """Return what the model, which computes on `device`, writes after `prompt`; greedily at temperature 0."""
    if not is_unicode(prompt):
        raise ValueError(
            f"the prompt {prompt[:60]!a} is not valid Unicode: it holds half of a surrogate pair, or bytes that are "
            "not UTF-8; give it as UTF-8 text"
        )
    ids = list(tokenizer(prompt)["input_ids"])
    return continue_tokens(model, tokenizer, [ids], device, max_new_tokens, temperature)[0]


def check_limits(max_new_tokens: int, temperature: float) -> None:
    """Refuse what no text can be generated with, before a model is loaded.

    Raises:
        ValueError: less than one token, or a temperature out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not (temperature == 0 or _COLDEST <= temperature <= _HOTTEST):
        raise ValueError(
            f"temperature is {temperature}; it must be 0, which decodes greedily, or from {_COLDEST} to {_HOTTEST}"
        )


def check_prompts(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, remedy: str = _SHORTER
) -> None:
    """Refuse prompts that the model has no embeddings for, which a GPU would only tell by ending the process.

    Args:
        model: causal language model.
        prompts: tokens of each.
        max_new_tokens: most tokens that follow a prompt.
        remedy: what to do about a prompt that is too long.

    Raises:
        ValueError: a token beyond the embeddings, or more positions than the model has learned.
    """
    from metatt_scale.backbone import check_positions, check_tokens

    check_tokens(model, max(map(max, prompts)))
    longest = max(map(len, prompts))
    what = f"a prompt of {longest} tokens and {max_new_tokens} new ones take {longest + max_new_tokens - 1} positions"
    check_positions(model, longest + max_new_tokens - 1, what, remedy)  # the last new one is not read again


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    in_step: bool = False,
) -> list[str]:
    """Return the text that follows each prompt of one left-padded batch (B = prompts, T = tokens of the longest).

    Args:
        model: causal language model, whole or sharded.
        tokenizer: its tokenizer (not changed).
        prompts: tokens of each.
        device: where the model computes.
        max_new_tokens: most tokens that follow a prompt.
        temperature: 0 decodes greedily.
        in_step: keep all ranks of a job at it until the last one has finished its text; a sharded model needs them.

    Raises:
        ValueError: an empty prompt, one that the model has no embeddings for, no room for a new token, or a
            temperature out of range.
    """
    import torch

    check_limits(max_new_tokens, temperature)
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one token to continue")
    check_prompts(model, prompts, max_new_tokens)
    # Padding by hand leaves the caller's tokenizer as it is, also where it has no padding token.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    config = _generation_config(model, tokenizer, pad, max_new_tokens, temperature)
    with evaluation_mode(model), _said_to_be_on(device, model), torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=tokens_BT, attention_mask=mask_BT, generation_config=config, synced_gpus=in_step
        )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [str(text) for text in texts]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad: Any, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Return greedy decoding or plain sampling, whatever the model's own configuration prefers."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    # What is left out here is taken from the model's own configuration, which may sample or penalise repetition.
    plain: dict[str, Any] = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}
    return GenerationConfig(
        **plain,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature else 50,  # 50: the neutral value under which greedy decoding warns of nothing
        max_new_tokens=max_new_tokens,
        max_length=None,
        pad_token_id=pad,
        eos_token_id=eos,
    )


@contextlib.contextmanager
def _said_to_be_on(device: torch.device, model: PreTrainedModel) -> Iterator[None]:
    """Let `model.device`, to which transformers moves the inputs of every step, be the device that computes.

    It is that of the first parameter, which an engine that offloads keeps on the host.
    """
    kind = type(model)
    if model.device != device:
        model.__class__ = type(kind.__name__, (kind,), {"device": device, "__module__": kind.__module__})
    try:
        yield
    finally:
        model.__class__ = kind


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and afterwards back to the mode it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
