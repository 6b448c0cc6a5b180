"""Environment variables that a command sets for its own process, before the libraries that read them are loaded.

Importing the package changes no environment. What the user has set stays. Child processes inherit what is set, and
launchers start each rank as a process of its own, in which nothing is loaded yet (docs/environment.md).
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import MutableMapping
from pathlib import Path

SPIN_COUNT = "10000"
"""Rounds of the loop in which a thread of GNU's OpenMP waits for its next work before it sleeps. With GNU's default,
300,000, threads wait in it while their partner's core is taken by another process; without any waiting each product
would wake its threads anew. Measured in docs/performance.md."""


def set_process_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what suits training, unless the user has decided; to be called before torch is imported.

    - GOMP_SPINCOUNT, unless OMP_WAIT_POLICY is set, which decides the same: how long OpenMP's threads wait in a loop.
    - PYTORCH_ALLOC_CONF=expandable_segments:True where torch is built for CUDA, unless there is a configuration under
      any of the names that torch reads: micro-batches differ in size, and blocks of fixed size fragment. Elsewhere
      allocators do not know the setting, and may warn of it.

    Args:
        environment: `os.environ`.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    # torch reads one of these names alone, and not everywhere in the same order: ours could win over the user's.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in environment for name in names) and _is_torch_for_cuda():
        environment[names[0]] = "expandable_segments:True"


def _is_torch_for_cuda() -> bool:
    """Return whether torch is built for CUDA, from its version file: torch itself must not be imported yet."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py")
    return version.is_file() and runpy.run_path(str(version)).get("cuda") is not None
