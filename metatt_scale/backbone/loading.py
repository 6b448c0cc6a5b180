"""From a recipe to a frozen model, or to its module tree without weights.

`load_backbone` gives a model whose linear layers are Linear, FrozenLinear4bit, bitsandbytes Linear8bitLt, or GPT-2's
Conv1D, whole on one device or sharded by an engine, with nothing that asks for a gradient. `load_skeleton` gives the
same module tree without any weights, for counting.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from metatt_scale.backbone.attention import pick_attention
from metatt_scale.backbone.checkpoint import Checkpoint, NotByLayers, Unfit, fetch
from metatt_scale.backbone.head import HeadStart, in_head
from metatt_scale.backbone.quantised import check_shardable
from metatt_scale.backbone.source import Source, first_line, resolve, why_not
from metatt_scale.backbone.units import Engine, Weights, bring_in
from metatt_scale.recipe import BackboneRecipe
from metatt_scale.recipe.architectures import architecture_file
from metatt_scale.strict_json import loads

logger = logging.getLogger(__name__)

_ENCODERS = ("bert", "roberta")
# Absent or unreadable files, settings of another type than the configuration's class wants, damaged weights.
_LOADING_ERRORS = (OSError, ValueError, ImportError, StrictDataclassError, SafetensorError)


def load_backbone(
    recipe: BackboneRecipe,
    device: torch.device,
    seed: int = 0,
    engine: Engine | None = None,
    classes: int | None = None,
    head: HeadStart | None = None,
) -> PreTrainedModel:
    """Load, quantise and freeze the model of a recipe, whole or (with an engine) one shard of it.

    No process holds more than what it keeps (the model in its final form, or with an engine its shard) and about two
    layers at any time: the model starts as shapes on the meta device, and each layer is filled from its safetensors,
    quantised and sharded before the next one. The files are mapped, so the processes of a node share their pages.
    Two kinds are first unpacked by transformers, whole, in every process: GGUF files, and without an engine what
    only transformers can load (`NotByLayers`).

    Args:
        recipe: what to load and how to store it.
        device: where this process computes.
        seed: of random weights, which follow from it and their module's path alone.
        engine: cuts the model among processes; all of them call this together.
        classes: put a head for so many classes on an encoder, for one number if 1; what the files lack of it is
            random.
        head: what that starts with; as the model's class says when None.

    Raises:
        ValueError: nothing loadable at `backbone.path`, or an option this machine or the engine cannot serve.
    """
    if engine is not None:
        check_shardable(recipe)
    source = resolve(recipe.path)
    attention = pick_attention(recipe.attention, device, recipe.dtype)
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype), "attn_implementation": attention}
    model, checkpoint = _open(recipe, source, options, engine, classes)
    empty = any(parameter.is_meta for parameter in model.parameters())
    bring_in(model, Weights(model, checkpoint, seed, head) if empty else None, recipe, device, engine)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    model.eval()
    if engine is not None:
        engine.finish(model)
    return model


def load_skeleton(recipe: BackboneRecipe, classes: int | None = None) -> PreTrainedModel:
    """Return the model's module tree on the meta device: shapes without weights, no download where a config ships.

    Args:
        recipe: what would be loaded.
        classes: as of `load_backbone`.

    Raises:
        ValueError: no configuration can be found, or it is of no encoder and `classes` are given.
    """
    shipped = architecture_file(recipe.path)  # also by hub id: planning needs no network
    source = Source(kind="random", location=str(shipped)) if shipped else resolve(recipe.path)
    if source.kind == "random":
        config = _random_config(source)
    else:
        try:
            config = _read_config(recipe, source)
        except _LOADING_ERRORS as error:
            raise ValueError(why_not(recipe.path, source, error)) from None
    with _one_message(recipe, source):
        _model_class(config, classes)
    return _build(config, classes, trust_remote_code=recipe.trust_remote_code)


def _open(
    recipe: BackboneRecipe, source: Source, options: dict[str, Any], engine: Engine | None, classes: int | None
) -> tuple[PreTrainedModel, Checkpoint | None]:
    """Return the model as shapes and the files that fill it (None: with random weights); or with its weights."""
    if source.kind == "random":
        return _random_shapes(recipe, source, options, classes), None
    if source.kind == "gguf" and classes is None:
        return _load_weights(recipe, source, options), None
    try:
        return _open_weights(recipe, source, options, classes)
    except NotByLayers as error:
        _check_whole(recipe, error, engine, classes)
        return _load_weights(recipe, source, options), None


def _random_shapes(
    recipe: BackboneRecipe, source: Source, options: dict[str, Any], classes: int | None
) -> PreTrainedModel:
    """Return the model of a configuration as shapes."""
    config = _random_config(source)
    with _one_message(recipe, source):
        _model_class(config, classes)
    return _build(config, classes, **options)


def _load_weights(recipe: BackboneRecipe, source: Source, options: dict[str, Any]) -> PreTrainedModel:
    """Load the whole model through transformers."""
    auto: Any = AutoModelForCausalLM
    # Told to go on, transformers lists what does not fit, and `_check_complete` refuses it by name.
    options = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _one_message(recipe, source):
        if source.kind == "gguf":
            options |= _gguf_options(source)
        else:
            options |= {"use_safetensors": True, "trust_remote_code": recipe.trust_remote_code}
            if recipe.revision:
                options["revision"] = recipe.revision
            auto = _model_class(_unquantised_config(recipe, source), None)
        model, report = auto.from_pretrained(source.location, **options)
        _check_complete(model, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if source.kind == "gguf":
        _clear_quantisation_mark(model)
    return model


def _check_whole(recipe: BackboneRecipe, why: NotByLayers, engine: Engine | None, classes: int | None) -> None:
    """Say that transformers loads the whole model, or refuse where that will not do.

    Raises:
        ValueError: the model is to be sharded, or to be a classifier, whose head has to follow from the seed.
    """
    if engine is not None or classes is not None:
        other = ", or set parallel.backbone: replicate" if classes is None else ""
        raise ValueError(f"backbone.path {recipe.path!r}: {why.cause}; {why.remedy}{other}")
    logger.warning(
        "backbone.path %r: %s, so every process first holds all of it unquantised; to load it layer by layer, %s",
        recipe.path,
        why.cause,
        why.remedy,
    )


def _open_weights(
    recipe: BackboneRecipe, source: Source, options: dict[str, Any], classes: int | None
) -> tuple[PreTrainedModel, Checkpoint]:
    """Return the model as shapes, and the safetensors that fill it."""
    with _one_message(recipe, source):
        config = _unquantised_config(recipe, source)
        auto = _model_class(config, classes)  # refuses before anything is fetched
        folder = fetch(recipe, source)
        code = (getattr(config, "auto_map", None) or {}).get(auto.__name__, "")
        if recipe.trust_remote_code and recipe.revision and code.startswith(f"{source.location}--"):
            options = {**options, "code_revision": recipe.revision}
        model = _build(config, classes, trust_remote_code=recipe.trust_remote_code, **options)
        _widen(model, options["dtype"])
        checkpoint = Checkpoint(folder, model)
        _check_complete(model, checkpoint.absent)
        if model.can_generate():
            model.generation_config = _read_generation_config(folder)
    return model, checkpoint


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make those tensors of a model of shapes float32 that its class does not let have 16 bits."""
    kept = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else []
    kept += list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else []
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in kept]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()


def _read_generation_config(folder: Path) -> GenerationConfig:
    """Return how the model generates, which older models say in their config.json."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextlib.contextmanager
def _one_message(recipe: BackboneRecipe, source: Source) -> Iterator[None]:
    """Turn what libraries raise while loading into one ValueError that names the cause and the remedy."""
    try:
        yield
    except Unfit as error:
        raise ValueError(f"backbone.path {recipe.path!r}: {error}") from None
    except _LOADING_ERRORS as error:
        raise ValueError(why_not(recipe.path, source, error)) from None


def _unquantised_config(recipe: BackboneRecipe, source: Source) -> PreTrainedConfig:
    config = _read_config(recipe, source)
    if getattr(config, "quantization_config", None) is not None:
        raise Unfit(
            "its weights are quantised already; give the unquantised model, which backbone.quantization packs"
        )
    return config


def _check_complete(model: PreTrainedModel, absent: set[str]) -> None:
    """Refuse weights that would be filled with random numbers; only an encoder's head may be absent."""
    if model.config.model_type in _ENCODERS:
        absent = {name for name in absent if not in_head(model, name)}
    if absent:
        shown = ", ".join(sorted(absent)[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise Unfit(
            f"the files lack {shown} (or have it in another shape than config.json says), and random numbers would "
            "take its place; fetch or save the model again"
        )


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


def _read_config(recipe: BackboneRecipe, source: Source) -> PreTrainedConfig:
    if source.kind == "gguf":
        return AutoConfig.from_pretrained(source.location, gguf_file=_gguf_options(source)["gguf_file"])
    options: dict[str, Any] = {"revision": recipe.revision} if recipe.revision else {}
    return AutoConfig.from_pretrained(source.location, trust_remote_code=recipe.trust_remote_code, **options)


def _random_config(source: Source) -> PreTrainedConfig:
    location = Path(source.location)
    file = location / "config.json" if location.is_dir() else location
    try:
        data = loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(data.pop("model_type"), **data)
    except KeyError:
        raise ValueError(f"{file}: not a transformers config JSON, it has no model_type") from None
    except (OSError, ValueError, AttributeError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{file}: not a transformers config JSON ({first_line(error)})") from None


def _model_class(config: PreTrainedConfig, classes: int | None) -> Any:
    is_encoder = config.model_type in _ENCODERS
    if classes is None:
        return AutoModelForMaskedLM if is_encoder else AutoModelForCausalLM
    if not is_encoder:
        raise Unfit(
            f"it is a {config.model_type}, but a classifier stands on an encoder here ({', '.join(_ENCODERS)}); give "
            "one, or leave `classifier` out"
        )
    return AutoModelForSequenceClassification


def _build(config: PreTrainedConfig, classes: int | None, **options: Any) -> PreTrainedModel:
    """Return the model of a configuration on the meta device."""
    auto = _model_class(config, classes)
    if classes is not None:
        config.num_labels = classes
        # Pipelines of an exported model would take one output for a class, and squash it.
        config.problem_type = "regression" if classes == 1 else None
    try:
        with torch.device("meta"):
            model = auto.from_config(config, **options)
        return model.to("meta")  # some classes draw random numbers for a weight, which are real ones even here
    except (
        ArithmeticError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # unchecked settings
        if "Unrecognized configuration class" in str(error):  # what follows is a list of every class there is
            raise ValueError(
                f"backbone: {config.model_type} is no language model ({auto.__name__} has none)"
            ) from None
        raise ValueError(f"backbone: no {config.model_type} can be built ({first_line(error)})") from None


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute every layer in the backward pass, non-reentrant (the reentrant kind loses hooks and gradients)."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    # transformers lets the embedding's output ask for a gradient, which only reentrant checkpoints need: every layer
    # below the first adapted one would be recomputed, and gathered, for nothing.
    model.disable_input_require_grads()
