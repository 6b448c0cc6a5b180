"""Checks on fake CUDA tensors run in processes of their own; `test_fake_cuda.py` starts them.

    METATT_FAKE_CUDA=LIBRARY python -m pytest tests/fake_cuda/check_training.py -k packed

runs some of them by hand, where LIBRARY is what `backend.build` has made.
"""

from __future__ import annotations

import os
import sys

from tests.fake_cuda import backend

if backend.VARIABLE in os.environ:
    assert "torch" not in sys.modules, "the idle CUDA backend has to be loaded before torch"
    backend.load()
    from tests.fake_cuda.fixtures import *  # noqa: F403
