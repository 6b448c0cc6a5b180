"""Fake tensors on `cuda:0` beside real ones on the CPU, and a record of every wait of the host for the device.

Operations that touch no device tensor run for real. The others compute shapes and devices only; what they return to
the host is made up. The tier therefore sees mixed devices, wrong placement, copies out of pageable memory and
reads of device values. It does not see kernels, streams, races, NCCL, or the forward of a sharded module.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers.masking_utils
import transformers.modeling_flash_attention_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.no_gpu import NO_GPU

CUDA = torch.device("cuda", 0)

_READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount", "_linalg_check_errors")
"""Operations whose result the host needs before it can go on."""


class Wait(NamedTuple):
    """One wait of the host for the device."""

    kind: str
    """`read` of a value, `upload` that is blocking or from pageable memory, or blocking `download`."""
    function: str
    """The innermost function of the package, as `file.py:name`."""
    line: str
    """The innermost line outside torch, for messages."""
    in_step: bool
    """Whether it held up the queue of optimizer steps."""


class FakeCuda:
    """What happened while a block ran on the fake device."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.late_reads = 0
        """Events that the loop waited for: numbers of a step that were copied while the next one is queued."""
        self.queue: tuple[CodeType, ...] = ()
        """The code of the functions that queue steps and read their numbers."""

    def in_step(self) -> list[Wait]:
        """Return the waits that held up the queue of optimizer steps."""
        return [wait for wait in self.waits if wait.in_step]

    def read_late(self) -> None:
        """Count a wait for an event."""
        self.late_reads += self._queues(list(_frames()))

    def note(self, kind: str) -> None:
        """Record a wait with the place that caused it."""
        frames = list(_frames())
        inner = next((f for f in frames if "/torch/" not in f.f_code.co_filename), frames[-1])
        ours = next((f for f in frames if "/metatt_scale/" in f.f_code.co_filename), inner)
        line = f"{inner.f_code.co_filename}:{inner.f_lineno}"
        self.waits.append(Wait(kind, _place(ours), line, in_step=self._queues(frames)))

    def _queues(self, frames: list[FrameType]) -> bool:
        return any(frame.f_code in self.queue for frame in frames)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"


class _Split(TorchDispatchMode):
    """Sends an operation to the CPU or to the fake device, and records waits."""

    def __init__(self, fake: FakeTensorMode, record: FakeCuda) -> None:
        super().__init__()
        self._fake, self._record = fake, record

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) or _is_cuda(leaf) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _READS:
            self._record.note("read")
            return self._read(name, args, func, kwargs)
        if name in ("index", "index_put_") and any(_is_mask(index) for index in args[1]):
            self._record.note("read")
            return args[0] if name == "index_put_" else self._masked(*args)
        if name in ("_to_copy", "copy_"):
            return self._copy(name, func, args, kwargs)
        if name.startswith(("_fused_", "_foreach_")):
            devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
            assert len(devices) == 1, f"{name} got tensors on {devices}; the kernel takes those of one device"
        return self._on_device(func, args, kwargs)

    def _on_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        def converted(leaf: Any) -> Any:
            real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
            return self._fake.from_tensor(leaf, static_shapes=True) if real else leaf

        args, kwargs = tree_map(converted, (args, kwargs))
        return func(*args, **kwargs)

    def _read(self, name: str, args: Any, func: Any, kwargs: Any) -> Any:
        """Return something possible: ones, true, all places."""
        first = args[0]
        if name == "_local_scalar_dense":
            return {torch.bool: True}.get(first.dtype, 1.0 if first.is_floating_point() else 1)
        if name == "equal":
            return True
        if name == "nonzero":
            return first.new_zeros((first.numel(), first.dim()), dtype=torch.int64)
        if name == "_linalg_check_errors":
            return None
        return self._on_device(func, args, kwargs)

    def _masked(self, values: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
        places = [index.flatten().long() if _is_mask(index) else index for index in indices if index is not None]
        assert len(places) == 1 and indices[0] is not None, "only one mask, at the front, is known here"
        mask = indices[0]
        return values.flatten(0, mask.dim() - 1).index_select(0, places[0])

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        in_place = name == "copy_"
        source = args[1] if in_place else args[0]
        target = args[0].device if in_place else torch.device(kwargs.get("device") or source.device)
        at_once = not (kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2]))
        if not isinstance(source, FakeTensor) and target.type == "cuda":
            if at_once or not getattr(source, "fake_pinned", False):
                self._record.note("upload")
        if isinstance(source, FakeTensor) and target.type == "cpu":
            if at_once:
                self._record.note("download")
            with unset_fake_temporarily():
                host = args[0] if in_place else torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                # What is read late are sums and flags, of which 0 is the ordinary one; scores want different values.
                return host.copy_(torch.arange(1, 1 + host.numel()).view(host.shape)) if at_once else host.zero_()
        return self._on_device(func, args, kwargs)


def _is_cuda(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _is_mask(index: Any) -> bool:
    return isinstance(index, FakeTensor) and index.dtype in (torch.bool, torch.uint8)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Have one fake GPU inside a `with` block; nothing else in the process knows of it."""
    from metatt_scale.training.loop import Trainer

    record = FakeCuda()
    record.queue = Trainer._launch.__code__, Trainer._settle.__code__

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def synchronize(self) -> None:
            record.read_late()

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        tensor.fake_pinned = True  # type: ignore[attr-defined]
        return tensor

    properties = SimpleNamespace(name="Fake", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132)
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "Fake",
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "Event": Event,
    }
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake)  # while torch says that there is no device: it would start one for `torch.tensor`
        stack.enter_context(mock.patch.dict(os.environ))
        for name in NO_GPU:  # which the tests set
            os.environ.pop(name, None)
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", pin_memory))
        # transformers leaves out its own reads of fake tensors, which it takes for a trace.
        for module in (transformers.masking_utils, transformers.modeling_flash_attention_utils):
            stack.enter_context(mock.patch.object(module, "is_tracing", lambda *_: False))
        stack.enter_context(_Split(fake, record))
        yield record
