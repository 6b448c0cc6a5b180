"""PEFT's methods on two ranks, replicated and sharded, also in 4 bits: equal replicas, the steps of one process."""

import pytest

from tests.distributed.peft_methods import METHODS, compare
from tests.tiny import FLOAT32

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_process(tmp_path, method):
    for strategy, (loss, tensor) in compare(tmp_path, method, "float32").items():
        assert loss <= FLOAT32 and tensor <= FLOAT32, strategy


@pytest.mark.parametrize("method", ["pissa", "adalora"])
def test_sharded_four_bits(tmp_path, method):
    """PiSSA's start is the same, for it comes from the same bytes."""
    ((loss, tensor),) = compare(tmp_path, method, "nf4", ("fsdp2",)).values()
    assert loss <= 4 * 2**-8 and tensor <= 4 * 2**-8
