"""launch/train.py with one fault on one rank of the first attempt; arguments are those of launch/train.py.

FAULT names the moment, or `moment:STEP` (a step of this process, from 1; 6 if not said), FAULT_RANK the rank.
The folder FAULT_NOTES receives `pid-RANK` and `attempt-RANK` (a line per attempt, with its number), `code-RANK` (exit
codes) and `moment` (when it was).
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

RANK = int(os.environ["RANK"])
KIND, _, step = os.environ["FAULT"].partition(":")
STEP = int(step or 6)  # of 12, checkpoints at 4, 8 and 12
MICRO_BATCHES = 2  # of one rank in a step: 16 examples, 2 ranks, 4 examples at once


def note(name: str, text: object) -> None:
    """Append a line to a file in FAULT_NOTES."""
    with Path(os.environ["FAULT_NOTES"], name).open("a") as file:
        file.write(f"{text}\n")


def die() -> None:
    """Go as by the kernel's memory killer: at once, without any clean-up."""
    note("moment", time.time())
    os.kill(os.getpid(), signal.SIGKILL)


def die_later() -> None:
    """The same when all other ranks wait in the collective."""
    time.sleep(0.3)
    die()


def die_unnoticed() -> None:
    """Die while the connections to the other ranks stay open, so that only a time-out tells, as with NCCL."""
    note("moment", time.time())
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Stop for ever, as a rank does whose disk or network hangs."""
    note("moment", time.time())
    os.kill(os.getpid(), signal.SIGSTOP)


def be_stopped() -> None:
    """Be told to end, as by a cluster that takes this machine back."""
    note("moment", time.time())
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    """Fail with an error of this rank's own, where leaving the process group would wait for the other ranks."""
    from metatt_scale.parallel import world

    # As NCCL's may, while a peer sits in a collective: pytorch issue 196968.
    world.dist.destroy_process_group = lambda *_: time.sleep(3600)  # type: ignore[assignment]
    note("moment", time.time())
    raise (ValueError if KIND == "refusal" else RuntimeError)("this rank's own trouble")


def on_call(owner: Any, name: str, number: int, act: Callable[[], None], counts: Callable[..., bool]) -> None:
    """Do `act` at the start of the `number`-th of those calls of owner.name that count."""
    real, calls = getattr(owner, name), 0

    def patched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if counts(*arguments):
            calls += 1
            if calls == number:
                act()
        return real(*arguments, **options)

    setattr(owner, name, patched)


def plant() -> None:
    """Prepare the fault in this rank, at a moment that is the same in every run."""
    from metatt_scale.parallel import world
    from metatt_scale.training import checkpoint, loop, objective

    def is_training(model: Any, *rest: Any) -> bool:
        return model.training

    def is_gradient(self: Any, values: Any) -> bool:
        return values.numel() > 100

    def at_step_8(self: Any) -> bool:
        return self.progress.step == 8

    def is_marker(path: Path, value: Any) -> bool:
        return path.name == "COMPLETE" and "step-000008" in str(path)

    def is_payload(tensor: Any, *rest: Any) -> bool:
        return tensor.dtype == world.torch.uint8  # the header is int64

    def die_at_payload() -> None:
        on_call(world.dist, "broadcast", 1, die_later, is_payload)

    in_forward = {
        "step": die,
        "unnoticed": die_unnoticed,
        "freeze": freeze,
        "stop": be_stopped,
        "error": fail,
        "refusal": fail,
    }
    if KIND in in_forward:  # in the last micro-batch
        on_call(objective, "token_loss_sum", MICRO_BATCHES * STEP, in_forward[KIND], is_training)
    elif KIND == "all-reduce":
        on_call(world.World, "sum", STEP, die_later, is_gradient)
    elif KIND == "broadcast":  # what follows the header, when rank 0 has saved step 8
        on_call(loop.Trainer, "_save", 1, die_at_payload, at_step_8)
    elif KIND == "sweep":  # the same for the new cores
        on_call(loop, "perform_sweep", 1, die_at_payload, lambda *_: True)
    elif KIND == "checkpoint" and RANK == 0:  # everything but the marker is written
        on_call(checkpoint, "write_json", 1, die, is_marker)
    elif KIND == "checkpoint":  # rank 0 writes, this one waits for it
        on_call(loop.Trainer, "_save", 1, die, at_step_8)
    else:
        raise ValueError(f"FAULT is {KIND!r}; no such moment")


def main() -> NoReturn:
    """Train, with the fault if it is this rank's."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    note(f"pid-{RANK}", os.getpid())
    note(f"attempt-{RANK}", attempt)
    from metatt_scale import cli

    leave = cli.leave

    def note_and_leave(code: int) -> NoReturn:
        note(f"code-{RANK}", code)
        leave(code)

    cli.leave = note_and_leave
    if RANK == int(os.environ["FAULT_RANK"]) and attempt == "0":
        plant()
    cli.run(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
