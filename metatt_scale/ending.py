"""How a command's process ends: what is said of an error, and how the process is left."""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import re
import signal
import sys
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that end a run after a whole, saved step; the first that any rank received counts."""
DIVERGED = 3
"""Exit code of a run whose loss was not finite any more: a result, which a study counts, where 2 is a mistake."""


class DivergedError(ValueError):
    """Training has come to no end that could be used."""


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit(code)` does, but let the operating system take the interpreter down.

    FSDP2 and DeepSpeed keep process groups alive after `destroy_process_group`. A thread of gloo's that frees the
    tensors of its last collective while the interpreter is being taken down asks for a lock that is no more, and the
    process aborts with all its work done (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads on, or the disk is full
            code = code or 1
    os._exit(code)


def which_rank() -> str:
    """Return where an error happened, for the jobs that have more than one place."""
    rank = os.environ.get("RANK")
    return "" if rank is None or os.environ.get("WORLD_SIZE", "1") == "1" else f" on rank {rank}"


def told_elsewhere(error: RuntimeError) -> str | None:
    """Return what to say of an error whose cause another rank tells ("" if nothing); None for all others."""
    from torch import distributed

    from metatt_scale.parallel import OtherRankError

    if isinstance(error, OtherRankError):
        return ""
    if isinstance(error, distributed.DistError) or re.search("gloo|NCCL", str(error)):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if re.search("tim(ed|ing|e) ?out", reason, re.IGNORECASE):  # gloo's word, NCCL's, the store's
            return (
                "a collective failed: another rank did not answer within parallel.timeout_minutes. Its own error "
                f"tells why; if it has none it hangs, was never started, or needs a larger value ({reason})"
            )
        return f"a collective failed, so another rank is gone; its own error tells why ({reason})"
    return None


def nccl_failed(error: Exception) -> str | None:
    """Return what to say where NCCL failed on this rank itself; None for all else, also for what a peer caused."""
    text = str(error)
    if not re.search("nccl(UnhandledCuda|System|Internal)Error|ncclInvalid(Usage|Argument)", text):
        return None
    lines = itertools.takewhile(lambda line: not line.startswith("Exception raised from"), text.splitlines())
    return f"{' '.join(line.strip() for line in lines)} Start with NCCL_DEBUG=INFO to see what NCCL had tried"


def out_of_memory(error: RuntimeError | MemoryError) -> str | None:
    """Return what to say where memory has run out, on a GPU or here; None for all other errors."""
    import torch

    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
        return None
    reason = (str(error).strip().splitlines() or ["no room"])[0]
    return (
        f"out of memory ({reason}); take less at once (training.micro_batch_size, data.cutoff_length, "
        "evaluation.batch_size; for benchmark --examples, --length, --ranks), set "
        "backbone.gradient_checkpointing=true or backbone.quantization=nf4, or use more memory; `metatt-scale plan "
        "RECIPE` estimates what a run needs"
    )


_REMEDIES = {
    errno.ENAMETOOLONG: "a name takes 255 bytes and a path 4095: choose a shorter one",
    errno.EEXIST: "it is in the way of what would be written there; remove it, or choose another path",
    errno.ENOTDIR: "a file is in the way of a folder on this path; remove it, or choose another path",
}


def _shown(filename: object) -> str:
    """Return a path, cut to what a person reads."""
    text = os.fsdecode(filename) if isinstance(filename, bytes) else str(filename)
    return text if len(text) < 300 else f"{text[:297]}..."


def message_of(error: Exception) -> str:
    """Return an error in one line, with the remedy where the disk is full."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f"{_shown(error.filename)}: " if error.filename else ""
    if error.errno in _REMEDIES:
        return f"{where}{error.strerror}; {_REMEDIES[error.errno]}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room and start the same command again (a run goes on from its newest checkpoint)"
        return f"{where}{error.strerror}; {remedy}"
    return f"{where}{error.strerror}" if where else str(error)
