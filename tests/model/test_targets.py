"""Which modules are adapted, and how the messages read when none can be."""

import pytest

from metatt_scale.adapter import find_targets, inject
from metatt_scale.recipe import AdapterRecipe
from tests.tiny import MODELS, tiny_model
from tests.toy import CPU


def test_layers_projections_and_widths():
    found = find_targets(tiny_model("llama"), ["q_proj", "k_proj", "down_proj"])
    assert found.layers == (0, 1, 2)
    assert [name.split(".")[-1] for name in found.projections] == ["q_proj", "k_proj", "down_proj"]
    assert [(t.d_in, t.d_out) for t in found.targets[:3]] == [(32, 32), (32, 16), (48, 32)]
    assert [(t.layer, t.projection) for t in found.targets] == [(i, m) for i in range(3) for m in range(3)]


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_takes_every_linear_of_the_layers_and_no_head(name):
    found = find_targets(tiny_model(name), "all-linear")
    n = {"gpt2": 4, "gpt_neox": 4, "phi3": 4, "phi": 6, "opt": 6, "bert": 6, "roberta": 6}.get(name, 7)
    assert len(found.projections) == n and len(found.targets) == 3 * n
    assert not any("head" in t.path for t in found.targets)


def test_fused_projection_is_one_target():
    assert len(find_targets(tiny_model("gpt2"), ["c_attn"]).projections) == 1


def test_one_name_can_be_several_projections():
    found = find_targets(tiny_model("roberta"), ["dense"])
    assert len(found.projections) == 3  # attention output, intermediate, output


def test_regular_expression_and_layer_range():
    model = tiny_model("llama")
    found = find_targets(model, r".*\.(q|v)_proj", layers=(1, 3))
    assert found.layers == (1, 2) and len(found.targets) == 4
    assert found.targets[0].layer == 0 and ".1." in found.targets[0].path
    adapter = inject(model, AdapterRecipe(rank=2, target_modules=("q_proj",), layers=(1, 2)), 0, CPU)
    assert adapter.spec.sizes == (32, 1, 1, 32)


@pytest.mark.parametrize(
    "targets, layers, message",
    [
        (["q_prj"], None, r"'q_prj' matches no module.*candidates: .*q_proj \(32 -> 32\)"),
        (["q_proj", "nothing"], None, "'nothing' matches no module"),
        (["self_attn"], None, "a LlamaAttention, which is not a linear"),
        (["embed_tokens"], None, "a Embedding, which is not a linear"),
        (["lm_head"], None, "lm_head, which belongs to no layer"),
        ("q_proj", None, r"write a list such as \[q_proj, v_proj\]"),
        ("([", None, "is not a regular expression"),
        (["q_proj"], (7, 9), "layers are 0 to 2"),
    ],
)
def test_errors_list_the_candidates(targets, layers, message):
    with pytest.raises(ValueError, match=message):
        find_targets(tiny_model("llama"), targets, layers)


def test_second_adapter_and_nonzero_start_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="allow_nonzero_start"):
        inject(model, AdapterRecipe(init="no-no-no-id"), 0, CPU)
    inject(model, AdapterRecipe(init="no-ze-no-id"), 0, CPU)
    with pytest.raises(ValueError, match="which is not a linear"):
        inject(model, AdapterRecipe(), 0, CPU)
