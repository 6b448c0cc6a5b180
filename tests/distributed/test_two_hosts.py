"""One rank on each of two hosts, under each launcher: train, be stopped, go on, and end with the bits of one host.

The hosts are network namespaces (two_hosts.sh). Each launcher holds the backbone in another way.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.jobs import (
    FAULTS,
    ROOT,
    TORCHRUN,
    TRAIN,
    adapter_of,
    checkpoints_of,
    fault,
    finish,
    stop,
    torchrun,
    write_recipe,
)

pytestmark = pytest.mark.slow
TWO_HOSTS = str(Path(__file__).parent / "two_hosts.sh")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
PORT = "29500"  # of a network of their own: nobody else is in it
# The deepspeed launcher numbers the ranks of a host in CUDA_VISIBLE_DEVICES, also where it computes on the CPU: on a
# machine with GPUs its children would see them.
ON_THE_CPU = {"deepspeed": {"ACCELERATE_USE_CPU": "true"}}


def launcher(name: str, folder: Path) -> list[str]:
    """The command of a launcher, the same on each host, as launch/multinode/README.md has it."""
    if name == "torchrun":
        place = ["--node-rank", "@HOST@", "--master-addr", "@FIRST@", "--master-port", PORT, "--max-restarts", "1"]
        return [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *place]
    if name == "deepspeed":
        (folder / "hostfile").write_text("host-0 slots=1\nhost-1 slots=1\n")
        place = ["--node_rank", "@HOST@", "--master_addr", "@FIRST@", "--master_port", PORT]
        return [*DEEPSPEED, "--hostfile", str(folder / "hostfile"), "--no_ssh", *place]
    place = ["--machine_rank", "@HOST@", "--main_process_ip", "@FIRST@", "--main_process_port", PORT]
    file = str(ROOT / "launch" / "accelerate" / "multi_node.yaml")
    return [*ACCELERATE, "--config_file", file, "--num_processes", "2", *place]


@pytest.fixture(scope="session")
def hosts():
    """Skip with the reason where two hosts cannot be had."""
    done = subprocess.run([TWO_HOSTS, "true"], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name, backbone, rank", [("deepspeed", "zero3", 0), ("accelerate", "fsdp2", 1)])
def test_two_hosts_train_stop_and_go_on_to_the_bits_of_one(hosts, undisturbed, name, backbone, rank):
    folder, expected = undisturbed
    if backbone != "replicate":
        one_host = f"one-host-{backbone}"
        recipe = write_recipe(folder, one_host, parallel={"backbone": backbone})
        finish(torchrun(TRAIN, recipe), folder / f"{one_host}.log")
        expected = adapter_of(folder / one_host)
    run, recipe, notes = folder / name, write_recipe(folder, name), folder / f"{name}-notes"
    start, cpu = [TWO_HOSTS, *launcher(name, folder)], ON_THE_CPU.get(name, {})
    output = stop([*start, str(FAULTS), str(recipe)], folder / f"{name}.log", "stop", rank, notes, **cpu)
    assert f"2 ranks, backbone: {backbone}" in output and not (run / "adapter").exists(), output
    assert checkpoints_of(run) == ["step-000004", "step-000006"], output
    output = finish([*start, str(TRAIN), str(recipe)], folder / f"{name}-again.log", **cpu)
    assert "resuming after step 6" in output and adapter_of(run) == expected, output


def test_a_loss_that_only_a_time_out_tells_restarts_both_hosts(hosts, undisturbed):
    """Host 1 restarts its rank at once, host 0 when its rank has waited for parallel.timeout_minutes, here 9 s."""
    folder, expected = undisturbed
    run, notes = folder / "torchrun", folder / "torchrun-notes"
    recipe = write_recipe(folder, "torchrun", parallel={"timeout_minutes": 0.15})
    command = [TWO_HOSTS, *launcher("torchrun", folder), str(FAULTS), str(recipe)]
    output = finish(command, folder / "torchrun.log", **fault("unnoticed", 1, notes))
    assert "parallel.timeout_minutes" in output and "resuming after step 4" in output, output
    assert [(notes / f"attempt-{rank}").read_text() for rank in (0, 1)] == ["0\n1\n", "0\n1\n"]
    assert adapter_of(run) == expected, output


def test_nothing_is_left_of_the_hosts(hosts):
    """Also where the command fails, or the script itself is stopped."""
    for command, code in ((["false"], 1), (["bash", "-c", "kill -TERM $PPID; sleep 30"], 143)):
        done = subprocess.run([TWO_HOSTS, *command], capture_output=True, text=True, timeout=25)
        assert done.returncode == code, done.stderr
    assert "metatt-" not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
