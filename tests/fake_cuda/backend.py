"""Build and load the idle CUDA backend (backend.cpp). Nothing here imports torch: it has to be loaded before."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

VARIABLE = "METATT_FAKE_CUDA"
"""Names the built library; set in the process that is to run on fake CUDA tensors."""
SOURCE = Path(__file__).with_name("backend.cpp")
_LIBRARIES = ("libc10.so", "libtorch_cpu.so")


def why_not() -> str | None:
    """Return why the backend cannot be built here; None where it can."""
    if _compiler() is None:
        return "no C++ compiler (c++, g++ or clang++) to build the idle CUDA backend with"
    missing = [name for name in _LIBRARIES if not (_torch() / "lib" / name).is_file()]
    if missing:
        return f"this build of torch has no {missing[0]} to link with"
    if (_torch() / "lib" / "libtorch_cuda.so").is_file():
        return "this build of torch has a CUDA backend of its own, which an idle one cannot replace"
    return None


def build(folder: Path) -> Path:
    """Compile the backend into a folder and return the library."""
    compiler, torch = _compiler(), _torch()
    assert compiler is not None
    library, include = folder / "libidlecuda.so", torch / "include"
    places = ["-I", include, "-I", include / "torch/csrc/api/include", "-L", torch / "lib"]
    links = ["-lc10", "-ltorch_cpu"]
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", *places, SOURCE, "-o", library, *links]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def load() -> None:
    """Load the library that VARIABLE names into this process; torch must not be there yet."""
    for path in [*(_torch() / "lib" / name for name in _LIBRARIES), os.environ[VARIABLE]]:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")  # found, not imported
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
