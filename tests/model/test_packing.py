"""Packed micro-batches: the same loss and gradients as example by example, and no example sees another."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    Llama4TextConfig,
)

from metatt_scale.adapter import inject
from metatt_scale.backbone import attention, enable_checkpointing
from metatt_scale.backbone.attention import PACKED_SDPA, Packing, packed_arguments
from metatt_scale.data import IGNORE, TokenTable, batches, collate, micro_batches, pack
from metatt_scale.recipe import AdapterRecipe, RecipeError
from metatt_scale.training import train
from metatt_scale.training.loss import fused_head, token_loss_sum
from metatt_scale.training.start import make_ready
from tests.tiny import FLOAT32, FLOAT64, MODELS, randomise, tiny_model, tokens
from tests.toy import CPU, LLAMA, make_trainer, quiet, said, toy_recipe, write_toy

CAUSAL = [name for name in MODELS if name not in ("bert", "roberta")]
UNEQUAL, ALONE, EQUAL = (11, 4, 7, 2), (9,), (6, 6, 6)
WINDOW = 4
QWEN3_MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}


def make_table(lengths, seed=0):
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flags = random.integers(0, 2, offsets[-1]).astype(np.uint8)
    flags[offsets[:-1]], flags[offsets[1:] - 1] = 0, 1
    return TokenTable(random.integers(2, 97, offsets[-1]).astype(np.int32), flags, offsets)


def model_and_chain(name, dtype=torch.float64, **changes):
    if name == "gemma3":
        config = Gemma3TextConfig(**{**MODELS["gemma"][1], "sliding_window": WINDOW, "initializer_range": 0.2})
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
        torch.manual_seed(0)
        model, targets = AutoModelForCausalLM.from_config(config).to(dtype).train(), ["q_proj", "v_proj"]
    else:
        model, targets = tiny_model(name, dtype=dtype, **changes), MODELS[name][2]
    chain = inject(model, AdapterRecipe(rank=4, target_modules=tuple(targets)), 0, CPU).to(dtype)
    randomise(chain)
    return model, chain


def loss_and_gradients(model, chain, batches):
    chain.zero_grad()
    total = 0.0
    for batch in batches:
        loss = token_loss_sum(model, batch, CPU)
        loss.backward()
        total += loss.item()
    chain.pull_back()
    return total, [core.grad.clone() for core in chain.cores]


def apart(table):
    return [collate(table, [i], 0) for i in range(len(table))]


def same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for one, other in zip(found[1], expected[1], strict=True):
        assert other.norm() > 1e-9
        assert (one - other).norm() <= 10 * tolerance * other.norm()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, {}) for name in CAUSAL),
        ("mistral", {"sliding_window": WINDOW}),
        ("qwen3", QWEN3_MIXED),
        ("gemma3", {}),
    ],
    ids=[*CAUSAL, "mistral window", "qwen3 mixed windows", "gemma3 mixed windows"],
)
def test_packed_is_apart(name, changes, recompute):
    table = make_table(UNEQUAL)
    model, chain = model_and_chain(name, **changes)
    expected = loss_and_gradients(model, chain, apart(table))  # transformers' own attention, and its own logits
    if recompute:
        enable_checkpointing(model)
    assert make_ready(model, True, CPU, quiet()) and fused_head(model) is not None
    assert model.config._attn_implementation == PACKED_SDPA
    same(loss_and_gradients(model, chain, [pack(table, range(len(table)), 0)]), expected, FLOAT64)
    same(loss_and_gradients(model, chain, [collate(table, range(len(table)), 0)]), expected, FLOAT64)


@pytest.mark.parametrize("lengths", [UNEQUAL, ALONE, EQUAL, (2,), (1, 5)], ids=str)
@pytest.mark.parametrize("name, changes", [("llama", {}), ("mistral", {"sliding_window": WINDOW})])
def test_any_lengths(name, changes, lengths):
    table = make_table(lengths)
    model, chain = model_and_chain(name, torch.float32, **changes)
    expected = loss_and_gradients(model, chain, apart(table))
    assert make_ready(model, True, CPU, quiet())
    same(loss_and_gradients(model, chain, [pack(table, range(len(table)), 0)]), expected, FLOAT32)


def hidden_of(model, ids, lengths):
    with torch.no_grad():
        packed = packed_arguments(model, lengths, sum(lengths), CPU)
        return model(input_ids=torch.cat(ids)[None], use_cache=False, **packed).logits[0].split(list(lengths))


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in CAUSAL), ("mistral", {"sliding_window": WINDOW})])
def test_no_example_sees_another(name, changes):
    model, _ = model_and_chain(name, torch.float32, **changes)
    assert make_ready(model.eval(), True, CPU, quiet())
    ids = list(tokens(1, sum(UNEQUAL))[0].split(list(UNEQUAL)))
    before = hidden_of(model, ids, UNEQUAL)
    for changed in range(len(UNEQUAL)):
        other = list(ids)
        other[changed] = (ids[changed] + 1) % 97
        after = hidden_of(model, other, UNEQUAL)
        for i in range(len(UNEQUAL)):
            assert torch.equal(before[i], after[i]) == (i != changed)


def test_without_packed_rows_attention_is_that_of_transformers():
    """Padded batches, left and right, and generation with a cache."""
    plain, ready = (tiny_model("llama", seed=1).eval() for _ in range(2))
    assert make_ready(ready, True, CPU, quiet()) and plain.config._attn_implementation == "sdpa"
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3], mask[1, 7:] = 0, 0
    for arguments in ({}, {"attention_mask": mask}):
        assert torch.equal(plain(ids, **arguments).logits, ready(ids, **arguments).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    left = mask.clone()
    left[1] = 1
    assert torch.equal(
        plain.generate(ids, attention_mask=left, **settings), ready.generate(ids, attention_mask=left, **settings)
    )


class Largest(TorchDispatchMode):
    """The most values of any tensor that an operation returns."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.values = max([self.values, *sizes])
        return result


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_nothing_is_quadratic_in_the_row_and_indices_are_made_once(recompute, monkeypatch):
    made, init = [], Packing.__init__

    def count(self, *arguments):
        made.append(arguments)
        init(self, *arguments)

    table = make_table([10] * 39 + [9])
    model, _ = model_and_chain("llama", torch.float32)
    if recompute:
        enable_checkpointing(model)
    assert make_ready(model, True, CPU, quiet())
    monkeypatch.setattr(Packing, "__init__", count)
    with Largest() as largest:
        token_loss_sum(model, pack(table, range(len(table)), 0), CPU).backward()
    length = sum([10] * 39 + [9])
    assert largest.values < length * length / 2
    assert len(made) == 1


def test_equal_lengths_need_no_copy():
    packing = Packing(EQUAL, sum(EQUAL), CPU)
    x_1HTd = torch.randn(1, 18, 4, 8).transpose(1, 2)
    spread = packing.spread(x_1HTd)
    assert spread.shape == (3, 4, 6, 8) and spread.data_ptr() == x_1HTd.data_ptr()
    gathered = packing.gather(spread.transpose(1, 2))
    assert torch.equal(gathered, x_1HTd.transpose(1, 2)) and gathered.data_ptr() == x_1HTd.data_ptr()


@pytest.mark.parametrize("fused", [True, False])
def test_a_filler_adds_nothing_but_runs_through_everything(fused):
    table = make_table([5, 5])
    arguments = {"micro_batch_size": 1, "rank": 2, "world_size": 3, "pad_token_id": 0}
    (batch,) = micro_batches(table, np.arange(2), **arguments, packed=True)
    assert batch.lengths == (5,) and (batch.labels_BS == IGNORE).all() and batch.input_ids_BS.shape == (1, 16)
    model, chain = model_and_chain("llama", torch.float32)
    assert make_ready(model, True, CPU, quiet())
    if not fused:
        del model.get_output_embeddings().forward
    seen = []
    for layer in model.model.layers[1:]:
        layer.register_full_backward_hook(lambda *_: seen.append(0))
    loss, gradients = loss_and_gradients(model, chain, [batch])
    assert loss == 0 and all(not gradient.any() for gradient in gradients) and len(seen) == 2


# ---- the tokens that fill a row up


FILLED_UP = [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": WINDOW}), ("qwen3", QWEN3_MIXED)]


@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL], ids=str)
@pytest.mark.parametrize("name, changes", FILLED_UP)
def test_what_fills_a_row_up_adds_nothing(name, changes, lengths, monkeypatch):
    """Beside a row that is not filled up, in float64; and whatever fills it, to the bit."""
    table, indices = make_table(lengths), range(len(lengths))
    row, filled_otherwise = pack(table, indices, 0), pack(table, indices, 96)
    monkeypatch.setattr(batches, "round_up", lambda count: count)
    bare = pack(table, indices, 0)
    assert bare.input_ids_BS.shape[1] == sum(lengths) < row.input_ids_BS.shape[1]
    model, chain = model_and_chain(name, **changes)
    assert make_ready(model, True, CPU, quiet())
    found = loss_and_gradients(model, chain, [row])
    same(found, loss_and_gradients(model, chain, [bare]), FLOAT64)
    other = loss_and_gradients(model, chain, [filled_otherwise])
    assert found[0] == other[0] and all(map(torch.equal, found[1], other[1]))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_fills_a_row_up_adds_nothing_in_bf16(name):
    """Where examples attend one by one: also what stands behind an example changes none of its bits."""
    table = make_table((40, 17, 33, 5))
    model, chain = model_and_chain(name, torch.float32)
    model.to(torch.bfloat16)
    chain.compute_dtype = torch.bfloat16
    assert make_ready(model, True, CPU, quiet())
    one, other = (loss_and_gradients(model, chain, [pack(table, range(4), pad)]) for pad in (0, 96))
    assert one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("equal", [True, False])
def test_what_fills_a_row_up_is_zero_behind_attention(equal):
    """The memory it would be otherwise may hold anything, and zero gradients times that are not zero."""
    lengths = (3, 3) if equal else (4, 2)
    packing = Packing(lengths, 9, CPU)
    x_1HWd = torch.full((1, 2, 9, 4), 5.0, requires_grad=True)
    gathered = packing.gather(packing.spread(x_1HWd).transpose(1, 2))
    assert gathered.shape == (1, 9, 2, 4) and (gathered[:, :6] == 5).all() and not gathered[:, 6:].any()
    (gradient,) = torch.autograd.grad(gathered, x_1HWd, torch.ones_like(gathered))
    assert (gradient[:, :, :6] == 1).all() and not gradient[:, :, 6:].any()
    heads = torch.full((2, 9, 4), 5.0, dtype=torch.bfloat16, requires_grad=True)
    mask = attention.causal_mask(16, None, torch.bfloat16)
    out = attention.attend_each(heads, heads, heads, lengths, mask, 1.0)
    assert out.shape == (9, 2, 4) and (out[:6] == 5).all() and not out[6:].any()
    (gradient,) = torch.autograd.grad(out, heads, torch.ones_like(out))
    assert gradient[:, :6].any() and not gradient[:, 6:].any()


@pytest.mark.parametrize(
    "width, ends",
    [(11, [0, 4, 11]), (16, [0, 4, 11, 16]), (32, [0, 4, 11, 18, 25, 32]), (33, [0, 4, 11, 18, 25, 32, 33])],
)
def test_flash_attention_takes_the_rest_of_a_row_for_further_examples(width, ends):
    """Its output for tokens of no example would be memory that nothing has written."""
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    arguments = packed_arguments(model, (4, 7), width, CPU)
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == ends
    # Neither length nor position is above those of the examples, which the model is known to take.
    assert arguments["max_length_q"] == arguments["max_length_k"] == 7
    assert arguments["position_ids"].tolist() == [[*range(4), *range(7), *[0] * (width - 11)]]


class Products(TorchDispatchMode):
    """The shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.shapes.add((func.overloadpacket, *(tuple(tensor.shape) for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def test_products_are_of_few_shapes_however_many_the_batches():
    """oneDNN keeps a kernel for each, which made the quickstart's memory grow to three times what it was."""
    table = make_table(np.random.default_rng(0).integers(20, 48, 60))
    model, chain = model_and_chain("llama", torch.float32, num_hidden_layers=1)
    model.to(torch.bfloat16)
    chain.compute_dtype = torch.bfloat16
    assert make_ready(model, True, CPU, quiet())
    seen = []
    for step in range(20):
        indices = np.random.default_rng(step + 1).permutation(60)[:4]
        arguments = {"micro_batch_size": 4, "rank": 0, "world_size": 1, "pad_token_id": 0, "packed": True}
        (batch,) = micro_batches(table, indices, **arguments)
        with Products() as products:
            token_loss_sum(model, batch, CPU).backward()
        seen.append(products.shapes)
    assert len(seen[0]) > 10 and len(set().union(*seen)) < 5 * len(seen[0])


def test_nothing_below_the_first_adapted_layer_is_differentiated():
    model = tiny_model("llama")
    chain = inject(model, AdapterRecipe(rank=4, layers=(1, 3)), 0, CPU)
    randomise(chain)
    enable_checkpointing(model)
    passes = {0: 0, 1: 0}
    for i in passes:
        model.model.layers[i].mlp.register_forward_pre_hook(lambda *_, i=i: passes.update({i: passes[i] + 1}))
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: outputs.append(out))
    model(tokens(), use_cache=False).logits.sum().backward()
    assert not outputs[0].requires_grad
    assert passes == {0: 1, 1: 2}, "the first adapted layer is recomputed, the one below it is not"


# ---- who is packed


def refused(model, packing="auto"):
    console = quiet()
    assert not make_ready(model, packing, CPU, console)
    assert model.config._attn_implementation != PACKED_SDPA
    return said(console)


@pytest.mark.parametrize(
    "name, message",
    [("bert", "BertForMaskedLM lets packed examples see each other"), ("roberta", "lets packed examples see each")],
)
def test_encoders_are_not_packed(name, message):
    assert message in refused(tiny_model(name))


def test_models_whose_masks_say_more_are_not_packed():
    config = Llama4TextConfig(**{**MODELS["llama"][1], "intermediate_size_mlp": 48, "num_local_experts": 2})
    assert "states its attention in masks only" in refused(AutoModelForCausalLM.from_config(config))


def test_models_that_fail_are_padded(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(attention.Packing, "spread", lambda self, x: x[:0])
    text = refused(model)
    assert text.startswith("examples are padded, not packed: LlamaForCausalLM does not take packed")
    assert text.count("\n") == 1


def test_positions_that_count_on_are_noticed(monkeypatch):
    from metatt_scale.training import start

    def counting_on(model, lengths, width, device):
        return packed_arguments(model, lengths, width, device) | {"position_ids": torch.arange(width)[None]}

    monkeypatch.setattr(start, "packed_arguments", counting_on)
    assert "counts their positions on" in refused(tiny_model("gpt2"))


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**{**MODELS["gemma"][1], "final_logit_softcapping": 3.0}),
        GraniteConfig(**{**MODELS["llama"][1], "logits_scaling": 3.0}),
        CohereConfig(**{**MODELS["llama"][1], "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}),
    ],
    ids=["capped", "divided", "scaled"],
)
def test_logits_that_are_not_the_heads_output_are_computed(config):
    torch.manual_seed(0)
    config.initializer_range = 0.2
    model = AutoModelForCausalLM.from_config(config).double().requires_grad_(False)
    packed = make_ready(model, "auto", CPU, quiet())
    assert fused_head(model) is None and "forward" not in vars(model.get_output_embeddings())
    assert packed == (config.model_type != "gemma2")  # whose attention is eager
    table = make_table(UNEQUAL)
    expected = 0.0
    for batch in apart(table):
        logits = model(batch.input_ids_BS).logits[0, :-1].log_softmax(-1)
        wanted = batch.labels_BS[0, 1:]
        expected -= sum(float(logits[i, t]) for i, t in enumerate(wanted) if t != IGNORE)
    indices = range(len(table))
    for batch in (collate(table, indices, 0), *([pack(table, indices, 0)] if packed else [])):
        assert float(token_loss_sum(model, batch, CPU)) == pytest.approx(expected, rel=FLOAT64)


def test_the_recipe_decides(tmp_path):
    write_toy(tmp_path)
    assert make_trainer(toy_recipe(tmp_path)).objective.packed
    assert not make_trainer(toy_recipe(tmp_path, training={"packing": False})).objective.packed
    eager = {"attention": "eager"}
    trainer = make_trainer(toy_recipe(tmp_path, backbone=eager))
    assert not trainer.objective.packed and "backbone.attention is eager" in said(trainer.console)
    assert said(make_trainer(toy_recipe(tmp_path)).console) == ""
    with pytest.raises(
        ValueError, match=r"packing is true, but backbone.attention is eager.*set training.packing: a"
    ):
        train(toy_recipe(tmp_path, backbone=eager, training={"packing": True}), quiet())
    with pytest.raises(RecipeError, match="packing"):
        toy_recipe(tmp_path, training={"packing": "always"})


def test_a_step_packed_is_a_step_padded(tmp_path):
    write_toy(tmp_path, config={**LLAMA, "model_type": "mistral", "sliding_window": 5})
    found = []
    for packing in (True, False):
        settings = {"packing": packing, "micro_batch_size": 5}
        trainer = make_trainer(toy_recipe(tmp_path, training=settings), torch.float64)
        randomise(trainer.adapter)
        _, indices = trainer.order.global_batch(0)
        loss, length = trainer._accumulate(indices, 100, 0)
        found.append((float(loss), [core.grad for core in trainer.adapter.cores]))
        assert length == trainer.data.table.lengths[indices].sum()
        found[-1] += (trainer.evaluate()["eval_loss"],)
    same(found[0], found[1], FLOAT64)
    assert found[0][2] == pytest.approx(found[1][2], rel=FLOAT64)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_in_bf16_a_packed_row_is_as_near_to_fp32_as_padded_ones(name):
    """On a CPU its examples attend one by one, by products of our own."""
    table = make_table((40, 17, 33, 5))
    exact_model, exact_chain = model_and_chain(name, torch.float32)
    exact = loss_and_gradients(exact_model, exact_chain, apart(table))
    errors = {}
    for how in ("padded", "packed"):
        model, chain = model_and_chain(name, torch.float32)
        model.to(torch.bfloat16)
        chain.compute_dtype = torch.bfloat16
        if how == "packed":
            assert make_ready(model, True, CPU, quiet())
        batches = [pack(table, list(range(len(table))), 0)] if how == "packed" else apart(table)
        found = loss_and_gradients(model, chain, batches)
        pairs = zip(found[1], exact[1], strict=True)
        errors[how] = max(float((one - other).norm() / other.norm()) for one, other in pairs)
        assert found[0] == pytest.approx(exact[0], rel=2e-2)
    assert 0 < errors["packed"] < 2 * errors["padded"] < 0.5
