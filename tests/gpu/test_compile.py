"""Compiled layers compute what the same layers compute as they are.

A GPU alone has the compiler's other half: on a CPU it writes C++, here Triton.
"""

import pytest
import torch

from tests.gpu.small import distances, first_gradient, recipe_for
from tests.tiny import FLOAT32
from tests.toy import CPU

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler about itself


@pytest.mark.parametrize(
    "packing, checkpointing",
    [(False, False), (True, False), (True, True)],
    ids=["padded", "packed", "packed, recomputed"],
)
def test_compiled_layers(packing, checkpointing, device, tmp_path):
    torch._dynamo.reset()
    backbone, training = {"gradient_checkpointing": checkpointing}, {"packing": packing}
    eager = recipe_for(tmp_path, device, backbone=backbone, training=training)
    compiled = recipe_for(tmp_path, device, backbone={**backbone, "compile": True}, training=training)
    far = distances(first_gradient(compiled, device), first_gradient(eager, CPU))
    assert max(far.values()) < FLOAT32
