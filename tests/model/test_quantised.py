"""What is packed to 4 and 8 bits, and what it stands for."""

import itertools
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt, Params4bit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import metatt_scale.backbone.quantised as quantised_module
from metatt_scale.backbone import load_backbone, quantised_linear
from metatt_scale.backbone.linear4bit import FrozenLinear4bit
from metatt_scale.recipe import BackboneRecipe
from tests.model.test_adapter import run_dense
from tests.quantised import adapt, packed_model, quantise, recipe_of, same_bits, snapshot, wide_model
from tests.tiny import FLOAT32, relative, tiny_model, tokens
from tests.toy import CPU

pytestmark = pytest.mark.usefixtures("quiet_bitsandbytes")
PACKED = {"nf4": FrozenLinear4bit, "fp4": FrozenLinear4bit, "int8": Linear8bitLt}
SETTINGS = [
    (quantization, double, storage)
    for quantization, double, storage in itertools.product(
        ("nf4", "fp4"), (True, False), ("uint8", "bfloat16", "float32")
    )
] + [("int8", True, "bfloat16")]


@pytest.mark.parametrize("quantization, double, storage", SETTINGS)
def test_every_linear_of_the_layers_and_nothing_else_is_packed(quantization, double, storage):
    original = wide_model()
    model, unpacked = packed_model(quantization, double_quantization=double, quant_storage=storage)
    in_layers = 0
    for path, module in original.named_modules():
        packed = model.get_submodule(path)
        if isinstance(module, nn.Linear) and ".layers." in path:
            in_layers += 1
            assert type(packed) is PACKED[quantization]
            error = relative(unpacked.get_submodule(path).weight, module.weight)
            # Half the mean step of the code book over the weights' spread: 16 levels, or 255.
            assert 1e-4 < error < (0.012 if quantization == "int8" else 0.15)
            if quantization == "int8":
                assert packed.weight.dtype == torch.int8
            else:
                state = packed.weight.quant_state
                assert (state.quant_type, state.nested) == (quantization, double)
                assert packed.weight.dtype == getattr(torch, storage)
                assert packed.weight.numel() * packed.weight.element_size() == module.weight.numel() // 2
        else:
            assert type(packed) is type(module)
    assert in_layers == 3 * 7
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert not any(p.requires_grad for p in model.parameters())


def test_storage_type_is_no_more_than_a_label():
    by_storage = [packed_model("nf4", quant_storage=s)[1].state_dict() for s in ("uint8", "bfloat16", "float32")]
    for other in by_storage[1:]:
        assert all(torch.equal(v, by_storage[0][k]) for k, v in other.items())


def test_double_quantisation_stores_less_and_errs_little_more():
    errors, sizes = [], []
    original = wide_model().model.layers[0].mlp.gate_proj
    for double in (False, True):
        model, unpacked = packed_model("nf4", double_quantization=double)
        errors.append(relative(unpacked.model.layers[0].mlp.gate_proj.weight, original.weight))
        state = model.model.layers[0].mlp.gate_proj.weight.quant_state
        sizes.append(state.absmax.element_size())
    assert sizes == [4, 1] and errors[0] != errors[1] and errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi3", "roberta", "qwen2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_other_classes_with_bias_and_fused_projections(name, quantization):
    model, unpacked = packed_model(quantization, name)
    ids = tokens()
    assert relative(model(ids).logits, unpacked(ids).logits) < FLOAT32
    adapter = adapt(model, name)
    assert relative(model(ids).logits, run_dense(unpacked, adapter, list(adapter.cores), ids)) < FLOAT32


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no torch Linear inside its layers; use quantization"):
        packed_model("nf4", "gpt2")


@pytest.mark.parametrize("width", [32, 96])
def test_widths_that_bitsandbytes_unpacks_wrongly_are_refused(width):
    model = tiny_model("llama", hidden_size=width)
    with pytest.raises(ValueError, match=rf"q_proj is {width} wide.*multiple of 64; use int8 or none"):
        quantise(model, recipe_of("nf4"))
    quantise(model, recipe_of("int8"))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_packing_in_pieces_changes_no_bit(quantization, storage, double, monkeypatch):
    """Against bitsandbytes' own packing of the whole weight; pieces here do not even divide it."""
    monkeypatch.setattr(quantised_module, "_PIECE", 3 * 1024)
    linear = nn.Linear(128, 320, bias=False).requires_grad_(False)
    ours: Any = quantised_linear(
        linear, recipe_of(quantization, quant_storage=storage, double_quantization=double), CPU
    )
    settings: Any = {"quant_type": quantization, "compress_statistics": double}
    settings |= {"quant_storage": getattr(torch, storage)}
    parameter: Any = Params4bit(linear.weight.data, **settings)
    whole, packed = parameter.to("cpu"), ours.weight
    assert torch.equal(packed.data.view(torch.uint8), whole.data.view(torch.uint8))
    state, expected = (weight.quant_state.as_dict() for weight in (packed, whole))
    assert state.keys() == expected.keys() and ours.quant_state is packed.quant_state
    for name, value in expected.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value, name


class Calls(TorchDispatchMode):
    """Counts the tensors that leave the host, and the calls that pack."""

    def __init__(self):
        super().__init__()
        self.sent = self.packed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sent += func is torch.ops.aten._to_copy.default and args[0].is_cpu and not result.is_cpu
        self.packed += "quantize_4bit" in func.name()
        return result


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_an_accelerator_gets_a_weight_in_one_copy_and_packs_it_in_one_call(quantization, monkeypatch):
    """Every copy out of memory that is not pinned blocks the host. The meta device stands for an accelerator."""
    monkeypatch.setattr(quantised_module, "_PIECE", 1024)
    recipe = recipe_of(quantization, double_quantization=False)  # which needs a table on the device, once a process
    linear = nn.Linear(64, 320, bias=False).requires_grad_(False)
    with Calls() as calls:
        packed: Any = quantised_linear(linear, recipe, torch.device("meta"))
    assert packed.weight.is_meta and packed.weight.quant_state.absmax.is_meta
    assert (calls.sent, calls.packed) == (1, 1)
    with Calls() as calls:
        quantised_linear(linear, recipe, CPU)
    assert (calls.sent, calls.packed) == (0, 20), "on a CPU pieces keep the scratch small"


@pytest.mark.parametrize("path", ["folder", "random"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_packing_layer_by_layer_gives_the_same_model(quantization, path, tmp_path):
    wide_model().save_pretrained(tmp_path)

    class Whole:
        def shard(self, unit):
            kinds = {type(module) for module in unit.modules() if isinstance(module, nn.Linear)}
            assert kinds <= {FrozenLinear4bit} or unit.__class__ is nn.Linear

        def finish(self, model):
            pass

    recipe = BackboneRecipe(
        path=str(tmp_path) if path == "folder" else f"random:{tmp_path}",
        dtype="float32",
        quantization=quantization,
        quant_storage="float32",
    )
    assert same_bits(load_backbone(recipe, CPU, seed=1, engine=Whole()), snapshot(load_backbone(recipe, CPU, seed=1)))


def test_load_backbone_packs_what_it_loads(tmp_path):
    wide_model().save_pretrained(tmp_path)
    by_hand, _ = packed_model("nf4")
    recipe = BackboneRecipe(path=str(tmp_path), dtype="float32", quantization="nf4", gradient_checkpointing=True)
    loaded = load_backbone(recipe, CPU)
    assert same_bits(loaded, snapshot(by_hand))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
