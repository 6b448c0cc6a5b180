"""ds_configs/ and launch/: every file is what its reader takes, and the Slurm script stops, saves and requeues."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from metatt_scale.parallel import launcher
from metatt_scale.recipe import ParallelRecipe, Recipe

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ACCELERATE = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
MULTINODE = ROOT / "launch" / "multinode"
SCRIPTS = [MULTINODE / "slurm.sh", ROOT / "tests" / "distributed" / "two_hosts.sh"]
READMES = [ROOT / "ds_configs" / "README.md", MULTINODE / "README.md", ROOT / "docs" / "exit_codes.md"]
STRATEGY = {"replicate.yaml": None, "fsdp2.yaml": "fsdp2", "zero3.yaml": "zero3", "multi_node.yaml": "fsdp2"}


def names(path):
    return path.name


# ---- DeepSpeed's files


@pytest.mark.parametrize("path", DS_CONFIGS, ids=names)
def test_deepspeed_reads_every_key(path, monkeypatch):
    """DeepSpeed's own classes take the file once "auto" is filled, and know all its keys."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads(path.read_text())
    assert config.pop("train_micro_batch_size_per_gpu") == config.pop("gradient_accumulation_steps") == "auto"
    assert config.pop("bf16") == config.pop("fp16") == {"enabled": "auto"}
    assert set(config) == {"zero_optimization"}
    filled = {**config, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    read = DeepSpeedConfig({**filled, "bf16": {"enabled": True}, "fp16": {"enabled": False}})
    zero = read.zero_config
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (4, 2)
    assert read.bfloat16_config.enabled and not read.float16_config.enabled
    assert int(zero.stage) == (2 if path.name == "zero2.json" else 3)
    assert not zero.model_extra, "keys that no field of DeepSpeed takes"
    offload, kind = zero.offload_param, re.search(r"offload_(\w+)", path.stem)
    assert (offload and offload.device) == (kind and kind[1])
    assert zero.offload_optimizer is None and not (offload and offload.model_extra)


def test_zero3_starts_without_trying_compilers(monkeypatch):
    """To read DeepSpeed's table of operations is to probe for gcc, nvcc and libraries, on every rank."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    from metatt_scale.parallel.zero3 import do_without_compiled_collective

    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    do_without_compiled_collective(deepspeed.ops)
    assert build_shm_op() is None and not started


@pytest.mark.parametrize("path", DS_CONFIGS, ids=names)
def test_the_toolkit_takes_every_deepspeed_file(path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "CROSS_"))]:
        monkeypatch.delenv(name)
    launch = launcher.read_launch(ParallelRecipe(deepspeed_config=str(path)))
    if path.name == "zero2.json":
        assert launch.strategy == "replicate" and launch.note and "replicate" in launch.note
    else:
        assert (launch.strategy, launch.note, launch.deepspeed) == ("zero3", None, json.loads(path.read_text()))


def test_the_readme_has_one_line_for_each_deepspeed_file():
    rows = re.findall(r"^\| `(\w+\.json)` \| .+ \|$", (ROOT / "ds_configs" / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [path.name for path in DS_CONFIGS] and len(rows) == 4


# ---- accelerate's files


def accelerate_arguments(path, *more):
    """What `accelerate launch --config_file path` works with."""
    parser = launch_command_parser()
    return _validate_launch_command(parser.parse_args(["--config_file", str(path), *more, "train.py"]))[0]


@pytest.mark.parametrize("path", ACCELERATE, ids=names)
def test_accelerate_takes_every_key(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_config_from_file(str(path))  # unknown keys are errors there, but not those of these sections
    sections = yaml.safe_load(path.read_text())
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*sections.get("fsdp_config", ()), *sections.get("deepspeed_config", ())} <= known
    arguments = accelerate_arguments(path)
    assert arguments.mixed_precision == "no" and arguments.dynamo_backend == "no" and not arguments.use_cpu
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (
        STRATEGY[path.name] == "fsdp2",
        STRATEGY[path.name] == "zero3",
    )
    assert arguments.multi_gpu == (path.name == "replicate.yaml"), "or a CPU host starts one process"
    if path.name == "multi_node.yaml":
        assert (arguments.num_machines, arguments.num_processes, arguments.rdzv_backend) == (2, 16, "static")


def test_fields_of_the_command_line_replace_those_of_the_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    more = ["--num_machines", "2", "--num_processes", "6", "--main_process_ip", "10.9.9.9", "--machine_rank", "1"]
    for path in ACCELERATE:
        arguments = accelerate_arguments(path, *more)
        assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 6, 1)
        assert arguments.main_process_ip == "10.9.9.9"


def test_fsdp_files_reach_the_toolkit(monkeypatch):
    """The environment that accelerate makes of the file is the one the toolkit takes for FSDP2."""
    for path in (path for path in ACCELERATE if STRATEGY[path.name] == "fsdp2"):
        arguments = accelerate_arguments(path, "--main_process_port", "0", "--machine_rank", "1")
        environment = prepare_multi_gpu_env(arguments)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert launcher.read_launch(ParallelRecipe()).strategy == "fsdp2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["replicate.yaml", "zero3.yaml"]
)  # tests/distributed/test_two_hosts.py has the others
def test_accelerate_launch_starts_as_many_ranks_as_asked_for(name, tmp_path):
    """Also on a host without GPUs, and with the signs from which the toolkit takes the strategy.

    In their processes torch is not loaded yet: what a command sets before it loads torch takes effect there too.
    """
    path = ROOT / "launch" / "accelerate" / name
    script = tmp_path / "show.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "loaded = str('torch' in sys.modules)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from metatt_scale.parallel.launcher import read_launch\n"
        "from metatt_scale.recipe import ParallelRecipe\n"
        "env = os.environ\n"
        "told = [env['RANK'], env['WORLD_SIZE'], read_launch(ParallelRecipe()).strategy, loaded]\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + env['RANK']).write_text(' '.join(told))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(path)]
    counts = ["--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *counts, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    strategy = STRATEGY[name] or "replicate"
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == [f"{r} 2 {strategy} False" for r in (0, 1)]


# ---- READMEs and scripts


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_what_a_readme_names_exists(path):
    text = path.read_text()
    for section, key in re.findall(r"\b(parallel|training|backbone)\.([a-z_0-9]+)", text):
        annotation: Any = Recipe.model_fields[section].annotation
        assert key in annotation.model_fields, f"{section}.{key}"
    for file in re.findall(r"\b((?:ds_configs|launch)/[\w/.-]*\w)", text):
        assert (ROOT / file.replace("NAME", "zero3")).exists(), file
    code = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    checked = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=names)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and os.access(path, os.X_OK), done.stderr


def test_the_hostfile_is_one_that_deepspeed_reads():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(MULTINODE / "hostfile")) == {"node-a": 8, "node-b": 8}


def test_the_readme_names_the_settings_of_the_slurm_script():
    readme, script = (MULTINODE / "README.md").read_text(), (MULTINODE / "slurm.sh").read_text()
    assert set(re.findall(r"METATT_\w+", readme)) == set(re.findall(r"METATT_\w+", script))


# ---- the Slurm script, on a cluster of stand-ins

FAKES = {
    # The step: what would run on two nodes runs here, one process after another gets its node's number.
    "srun": """
        echo "srun $*" >> calls
        [[ $1 == --kill-on-bad-exit=1 ]] && shift
        SLURM_NODEID=0 "$@" & first=$!
        SLURM_NODEID=1 "$@" & second=$!
        echo "$first $second" > tasks
        code=0
        wait $first || code=$?
        wait $second || code=$?
        exit $code""",
    "scancel": 'echo "scancel $*" >> calls; kill -TERM $(cat tasks)',
    "scontrol": """
        echo "scontrol $*" >> calls
        [[ $1 != show ]] || printf 'node-a\\nnode-b\\n'""",
    # torchrun and its ranks: a few steps; SIGTERM leads to a checkpoint and torchrun's exit code.
    "python": """
        echo "python $* threads=$OMP_NUM_THREADS nic=${GLOO_SOCKET_IFNAME:-}" >> calls
        stop() { [[ $SLURM_NODEID != 0 ]] || touch checkpoint; exit 1; }
        trap stop TERM
        [[ ! -e broken ]] || exit 1
        touch "running$SLURM_NODEID"
        [[ ! -e checkpoint ]] || exit 0
        for _ in {1..600}; do sleep 0.1; done""",
}


@pytest.fixture
def cluster(tmp_path):
    """Start the Slurm script among stand-ins for Slurm's commands and for python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": "123456", "NNODES": "2", "JOB_NODELIST": "node-[a-b]", "GPUS_ON_NODE": "8"}
    slurm |= {"SUBMIT_DIR": str(tmp_path), "CPUS_PER_TASK": "32"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "METATT_NIC": "ib0"}
    clean = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    }

    def start(*arguments, **more):
        command, env = ["bash", str(MULTINODE / "slurm.sh"), *arguments], {**clean, **environment, **more}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return tmp_path, start


def calls(folder, program):
    lines = (folder / "calls").read_text().splitlines()
    return [line.removeprefix(program).strip() for line in lines if line.split()[0] == program]


def wait_for(*paths):
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of {paths} appeared"
        time.sleep(0.02)


def test_slurm_stops_saves_and_requeues_before_the_time_limit(cluster):
    folder, start = cluster
    job = start("recipe.yaml", "adapter.rank=8")
    wait_for(folder / "running0", folder / "running1")
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    assert (folder / "checkpoint").exists() and job.returncode != 0
    assert calls(folder, "scancel") == ["--signal=TERM 123456"]
    assert calls(folder, "scontrol") == ["show hostnames node-[a-b]", "requeue 123456"], output
    assert "2 nodes of 8 ranks, meeting at node-a:23456" in output and "back into the queue" in output
    line = (
        "-m torch.distributed.run --node-rank {} --nnodes 2 --nproc-per-node 8 --max-restarts 3 --master-addr node-a "
        "--master-port 23456 launch/train.py recipe.yaml adapter.rank=8 threads=1 nic=ib0"
    )
    assert sorted(calls(folder, "python")) == [line.format(0), line.format(1)]
    again = start("recipe.yaml", "adapter.rank=8")  # as the queue would, later
    output, _ = again.communicate(timeout=30)
    assert again.returncode == 0 and output.endswith("finished\n")
    assert len(calls(folder, "scontrol")) == 3, "a finished job is not queued again"


def test_slurm_leaves_a_failed_job_out_of_the_queue(cluster):
    folder, start = cluster
    (folder / "broken").touch()
    job = start("recipe.yaml")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 1 and "not queued again" in output
    assert calls(folder, "scontrol") == ["show hostnames node-[a-b]"]


@pytest.mark.parametrize("job_id", ["7", "119999", "4294967295"])
def test_the_port_of_a_slurm_job_is_none_that_clients_are_given(cluster, job_id):
    """Linux gives those from 32768 on to whoever opens a connection (net.ipv4.ip_local_port_range)."""
    folder, start = cluster
    (folder / "broken").touch()
    output, _ = start("recipe.yaml", SLURM_JOB_ID=job_id).communicate(timeout=30)
    (port,) = re.findall(r"meeting at node-a:(\d+)", output)
    assert 1024 <= int(port) < 32768


def test_slurm_wants_a_recipe(cluster):
    _, start = cluster
    job = start()
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and output.startswith("error: no recipe given")
