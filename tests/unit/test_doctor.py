"""`metatt-scale doctor`: every verdict, from facts as they would be found on such a machine."""

import ctypes
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from metatt_scale.doctor import command, devices, machine, packages, processes
from metatt_scale.doctor.answers import describe_hardware, read_launch
from metatt_scale.doctor.ask import Answer
from metatt_scale.doctor.line import Line, lines_of, printable
from metatt_scale.doctor.nvml import read_driver
from metatt_scale.hardware import Gpu, Hardware
from metatt_scale.process import SPIN_COUNT

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
UNTRIED = Answer(error="not tried", tried=False)

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=80 * GIB, uuid="1")
T4 = Gpu(name="Tesla T4", capability=(7, 5), memory=16 * GIB, uuid="2")
NODES = ("/dev/nvidia0",)
CUDA, CPU = {"cuda": "13.0", "rocm": None}, {"cuda": None, "rocm": None}


def build(of=CUDA, kernels=("sm_75", "sm_80", "sm_90"), **other):
    return {**of, "kernels": list(kernels), "nccl": None, "gloo": True, **other}


def hardware(*gpus, of=CUDA, environment=None, **found):
    name = "2.13.0+cu130" if of is CUDA else "2.13.0+cpu"
    return Answer(facts=describe_hardware(Hardware(torch=name, gpus=gpus, **of, **found), environment or {}))


def verdict_of(lines, name):
    return next(line.verdict for line in lines if line.name == name)


# ---- lines


def test_a_check_that_raises_is_a_line():
    def broken():
        yield Line(name="fine", found="fine")
        raise KeyError("cuda")

    (line,) = lines_of("driver", broken)
    assert line.name == "driver" and line.verdict == "warning" and "KeyError" in line.found


def test_text_from_outside_is_printable_and_holds_no_secret():
    environment = {"HF_TOKEN": "hf_0123456789", "MY_PASSWORD": "hunter22", "WANDB_API_KEY": "1", "HOME": "/home/jane"}
    text = printable(
        "a\x1b[31m\nb\u202e\udcff hf_0123456789 http://jane:pw1@proxy/ hunter22 /home/jane é 1", environment
    )
    assert text == r"a\x1b[31m\nb\u202e\udcff (HF_TOKEN) http://***@proxy/ (MY_PASSWORD) /home/jane é 1"


def test_variables_are_shown_and_secrets_are_not():
    shown = {
        "RANK": "garbage",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "",
        "HF_HUB_OFFLINE": "1",
        "SLURM_JOB_ID": "7",
    }
    kept = {"HF_TOKEN": "hf_secret", "NCCL_AUTH_TOKEN": "nccl_secret", "EDITOR": "vi", "WANDB_API_KEY": "key_secret"}
    lines = {line.name: line.found for line in processes.check_variables({**shown, **kept})}
    assert {name: lines[name] for name in shown} == {**shown, "OMP_NUM_THREADS": "set, and empty"}
    assert lines.keys() == {*shown, "NCCL_AUTH_TOKEN", "secrets"}
    assert not re.search("hf_secret|nccl_secret|key_secret", str(lines))
    assert "HF_TOKEN set" in lines["secrets"] and "MLFLOW_TRACKING_TOKEN unset" in lines["secrets"]


# ---- packages

TORCH, PEFT, FLASH = (
    next(package for package in packages.PACKAGES if package.name == name) for name in ("torch", "peft", "flash-attn")
)
UNDEFINED = Answer(error="ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEa")


@pytest.mark.parametrize(
    ("package", "version", "allowed", "answer", "verdict"),
    [
        (TORCH, "2.13.0+cpu", "<3,>=2.11", Answer(), "ok"),
        (TORCH, "2.11.0a0+git1234", "<3,>=2.11", Answer(), "ok"),
        (TORCH, "2.10.1", "<3,>=2.11", Answer(), "problem"),
        (TORCH, "3.0.0", "<3,>=2.11", Answer(), "problem"),
        (TORCH, "local", "<3,>=2.11", Answer(), "ok"),
        (TORCH, "2.13.0", None, Answer(), "ok"),
        (TORCH, None, "<3,>=2.11", None, "problem"),
        (TORCH, "2.13.0", "<3,>=2.11", UNDEFINED, "problem"),
        (PEFT, None, ">=0.19", None, "note"),
        (PEFT, "0.18.0", ">=0.19", Answer(), "warning"),
        (PEFT, "0.19.0", ">=0.19", UNTRIED, "note"),
        (FLASH, "2.8.0", ">=2.7", UNDEFINED, "problem"),
    ],
)
def test_a_package(package, version, allowed, answer, verdict):
    line = packages.check_package(package, version, allowed, answer)
    assert line.verdict == verdict and line.name == package.name
    assert bool(line.remedy) == (verdict in ("warning", "problem"))
    assert line.found.startswith(version or "not installed")


def test_every_requirement_is_looked_at():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndev = [")[0]
    wanted = set(re.findall(r'"([a-z][a-z-]+)[<>=]+[0-9.]+[^"]*"', text)) - {"setuptools"}
    wanted |= set(re.findall(r'"([a-z]+)"', text.partition("\ntrackers = [")[2].partition("]")[0]))
    assert {"torch", "lm-eval", "wandb", "matplotlib"} <= wanted
    assert wanted == {package.name for package in packages.PACKAGES} - {"triton"}  # which torch brings


def test_ranges_are_those_on_record():
    allowed = packages.requirements()
    assert allowed["torch"] and allowed["lm-eval"] and allowed["wandb"] == ""
    assert packages.is_allowed("2.13.0", allowed["torch"]) and not packages.is_allowed("1.0", allowed["torch"])


# ---- devices


class FakeNvml:
    """NVML as ctypes sees it: functions that fill what they are given by reference."""

    def __init__(self, gpus=(), failing=None):
        self._gpus, self._failing = gpus, failing

        def explain(code):
            return b"Driver/library version mismatch"

        self.nvmlErrorString = explain

    def __getattr__(self, name):
        def function(*arguments):
            if name == self._failing:
                return 18
            if fill := vars(FakeNvml).get(f"_{name}"):
                fill(self, *arguments)
            return 0

        return function

    def _nvmlSystemGetDriverVersion(self, buffer, length):
        buffer.value = b"580.65.06"

    def _nvmlSystemGetCudaDriverVersion_v2(self, version):
        version._obj.value = 13010

    def _nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self._gpus)

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1

    def _nvmlDeviceGetMemoryInfo(self, handle, memory):
        gpu = self._gpus[handle.value - 1]
        memory._obj.total, memory._obj.free, memory._obj.used = gpu.memory, gpu.memory // 4, gpu.memory * 3 // 4

    def _nvmlDeviceGetName(self, handle, buffer, length):
        assert isinstance(length, ctypes.c_uint) and length.value == len(buffer)
        buffer.value = self._gpus[handle.value - 1].name.encode()

    def _nvmlDeviceGetUUID(self, handle, buffer, length):
        buffer.value = b"GPU-" + self._gpus[handle.value - 1].uuid.encode()


def test_the_driver_is_read_without_cuda():
    driver = read_driver(FakeNvml((H100, T4)))
    assert driver == {
        "version": "580.65.06",
        "cuda": [13, 1],
        "gpus": [
            {"name": H100.name, "uuid": "1", "total": 80 * GIB, "free": 20 * GIB},
            {"name": T4.name, "uuid": "2", "total": 16 * GIB, "free": 4 * GIB},
        ],
    }
    shared = read_driver(FakeNvml((H100,), failing="nvmlDeviceGetMemoryInfo"))
    assert shared is not None and shared["gpus"][0]["total"] == 0
    with pytest.raises(RuntimeError, match="version mismatch"):
        read_driver(FakeNvml((H100,), failing="nvmlInit_v2"))


@pytest.mark.parametrize(
    ("answer", "nodes", "verdict"),
    [
        (Answer(facts=None), (), "note"),
        (Answer(facts=None), NODES, "problem"),
        (Answer(error="RuntimeError: nvmlInit_v2: Driver/library version mismatch (code 18)"), NODES, "problem"),
        (Answer(error="RuntimeError: nvmlInit_v2: Driver Not Loaded (code 9)"), (), "note"),
        (Answer(facts={"version": "580.65.06", "cuda": [13, 0], "gpus": []}), NODES, "ok"),
    ],
)
def test_a_driver(answer, nodes, verdict):
    assert devices.check_driver(answer, nodes).verdict == verdict


OLD = {
    "nodes": NODES,
    "driver": "470.82.01",
    "driver_cuda": (11, 4),
    "reason": "driver too old (found version 11040)",
}
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("of", "gpus", "found", "environment", "verdicts"),
    [
        (CUDA, (H100,), {"nodes": NODES}, {}, ("ok", "ok")),
        (CUDA, (H100,), {"nodes": NODES}, {"ACCELERATE_USE_CPU": "1"}, ("ok", "ok")),
        (CUDA, (H100,), {"nodes": NODES}, {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "1"}, ("ok", "problem")),
        (CUDA, (), OLD, {}, ("problem", "problem")),
        (CUDA, (), {**OLD, "driver_cuda": (13, 0)}, HIDDEN, ("note", "ok")),
        (CUDA, (), {}, {}, ("note", "ok")),
        (CPU, (), {"nodes": NODES}, {}, ("problem", "warning")),
        (CPU, (), {"nodes": NODES}, {"ACCELERATE_USE_CPU": "1"}, ("note", "ok")),
        (CPU, (), {}, {}, ("note", "ok")),
        (CPU, (), {"others": ("MPS",)}, {}, ("note", "warning")),
    ],
)
def test_a_build_and_the_device_that_is_taken(of, gpus, found, environment, verdicts):
    answer = hardware(*gpus, of=of, environment=environment, **found)
    lines = devices.check_build(build(of), answer), devices.check_device(answer)
    assert tuple(line.verdict for line in lines) == verdicts
    assert all(line.remedy for line in lines if line.verdict != "ok" and line.verdict != "note")


def test_an_old_driver_is_named_once():
    answer = hardware(**OLD)
    told, device = devices.check_build(build(), answer), devices.check_device(answer)
    assert "470.82.01" in told.found and "11.4" in told.found and "CUDA 13.0" in told.remedy
    assert "470" not in device.found + device.remedy and "cpu" in device.remedy


@pytest.mark.parametrize(
    ("gpu", "free", "kernels", "verdict"),
    [
        (H100, 79 * GIB, ("sm_80", "sm_90"), "ok"),
        (H100, None, (), "ok"),
        (H100, 30 * GIB, ("sm_90",), "warning"),
        (H100, 79 * GIB, ("sm_75", "sm_100"), "problem"),
        (T4, 15 * GIB, ("sm_75",), "warning"),
        (T4, 15 * GIB, ("sm_80", "sm_90"), "problem"),
    ],
)
def test_a_gpu(gpu, free, kernels, verdict):
    facts = hardware(gpu, nodes=NODES).facts["gpus"][0]
    line = devices.check_gpu("GPU 0", facts, free, build(kernels=kernels))
    assert line.verdict == verdict and ("emulated" in line.found) == (gpu is T4)
    assert "float16" in line.remedy or not (gpu is T4 and verdict == "warning")


def test_gpus_are_matched_with_the_driver_whatever_their_order():
    driver = Answer(facts=read_driver(FakeNvml((T4, H100))))
    lines = {line.name: line for line in devices.check_gpus(build(), hardware(H100, nodes=NODES), driver)}
    assert "20.0 GiB free" in lines["GPU 0"].found and T4.name in lines["other GPUs"].found


@pytest.mark.parametrize(
    ("kernels", "capability", "runs"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_89",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("compute_80",), (12, 0), True),
        (("compute_90",), (8, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100f", "sm_90a"), (10, 3), False),
        (("gfx942",), (9, 0), False),
    ],
)
def test_which_kernels_run_where(kernels, capability, runs):
    assert devices.has_kernels(kernels, capability) == runs


ON_GPU = {"device": "cuda:0", "library": {"file": "libbitsandbytes_cuda130.so", "for_gpu": True, "error": ""}}
FOR_CPU = {"file": "libbitsandbytes_cpu.so", "for_gpu": False, "error": ""}
NO_LIBRARY = {"file": None, "for_gpu": False, "error": "libcudart.so.13: cannot open"}


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({**ON_GPU, "beyond": 0.152, "product": 0.002}, "ok"),
        ({**ON_GPU, "beyond": 0.3, "product": 0.002}, "problem"),
        ({**ON_GPU, "beyond": 0.152, "product": 0.2}, "problem"),
        ({**ON_GPU, "beyond": float("nan"), "product": 0.0}, "problem"),
        ({**ON_GPU, "library": FOR_CPU, "beyond": 0.152, "product": 0.002}, "problem"),
        ({**ON_GPU, "device": "cpu", "library": FOR_CPU, "beyond": 0.152, "product": 0.002}, "ok"),
        ({**ON_GPU, "device": "cpu", "library": NO_LIBRARY, "beyond": 0.152, "product": 0.002}, "warning"),
        ({**ON_GPU, "free": GIB}, "note"),
    ],
)
def test_four_bit_kernels(facts, verdict):
    assert devices.check_four_bits(Answer(facts=facts)).verdict == verdict


def test_four_bit_kernels_that_fail():
    assert devices.check_four_bits(Answer(error="RuntimeError: no kernel image")).verdict == "problem"
    assert devices.check_four_bits(UNTRIED).verdict == "note"


def test_deepspeed_ops_are_only_a_note():
    ready = {
        "accelerator": "cuda",
        "built": False,
        "libaio": True,
        "compiler": "/usr/bin/c++",
        "ninja": "/usr/bin/ninja",
    }
    assert devices.check_deepspeed(Answer(facts={**ready, "built": True})).verdict == "ok"
    assert "libaio" not in devices.check_deepspeed(Answer(facts=ready)).found
    line = devices.check_deepspeed(Answer(facts={**ready, "libaio": False}))
    assert line.verdict == "note" and "libaio" in line.found and "ninja" not in line.found
    assert devices.check_deepspeed(Answer(error="ImportError: x")).verdict == "problem"


def test_bfloat16_of_a_cpu():
    new, old = "model name\t: New\nflags\t\t: fpu avx512_bf16\n", "model name\t: Old\nflags\t\t: fpu avx2\n"
    assert devices.check_cpu(new, {}).verdict == "ok" and "New" in devices.check_cpu(new, {}).found
    assert devices.check_cpu(old, {"cpu": "AVX2"}).verdict == "note" and devices.check_cpu("", {}).verdict == "note"


# ---- processes


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
        ({"RANK": "garbage"}, "RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "--fsdp_offload_params",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"},
            "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/no.json"}, "/no.json"),
    ],
)
def test_a_launcher(environment, named, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines = list(processes.check_launch(Answer(facts=read_launch()), environment))
    problems = [line for line in lines if line.verdict == "problem"]
    assert bool(problems) == (named is not None)
    assert all(line.remedy for line in problems) and (named or "") in "".join(line.found for line in problems)


def test_slurm_tasks_that_do_not_know_each_other():
    facts = {"place": {"rank": 0, "size": 1, "local_size": 1}, "strategy": "replicate", "note": None, "refusals": []}
    assert verdict_of(processes.check_launch(Answer(facts=facts), {"SLURM_NTASKS": "4"}), "Slurm") == "note"
    assert len(list(processes.check_launch(Answer(facts=facts), {"SLURM_NTASKS": "1"}))) == 1


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (Answer(facts={"sums": [3.0, 3.0]}), "ok"),
        (Answer(facts={"sums": [3.0, 2.0]}), "problem"),
        (Answer(facts={"sums": ["RuntimeError: Unable to find address for: eth99"] * 2}), "problem"),
        (Answer(error="no answer within 120 seconds"), "problem"),
    ],
)
def test_gloo(answer, verdict):
    assert processes.check_gloo(build(), answer).verdict == verdict


def test_nccl_is_missed_only_by_several_gpus():
    assert processes.check_nccl(build(nccl="2.27.3"), hardware(H100, H100)).verdict == "ok"
    assert processes.check_nccl(build(), hardware(H100)).verdict == "note"
    assert processes.check_nccl(build(), hardware(H100, H100)).verdict == "problem"


# ---- the machine


@pytest.mark.parametrize(
    ("found", "environment", "verdict"),
    [
        ({"threads": 8}, {}, "ok"),
        ({"threads": 8, "busy": 0.2}, {}, "ok"),
        ({"threads": 8, "busy": 2.0}, {}, "warning"),
        ({"threads": 8, "busy": 2.0}, {"GOMP_SPINCOUNT": SPIN_COUNT}, "ok"),  # as commands set it
        ({"threads": 8, "busy": 2.0}, {"OMP_WAIT_POLICY": "PASSIVE"}, "ok"),
        ({"threads": 8, "busy": 2.0}, {"OMP_WAIT_POLICY": "ACTIVE"}, "warning"),
        ({"threads": 4, "busy": 2.0}, {"OMP_NUM_THREADS": "4"}, "ok"),
        ({"threads": 1, "busy": 8.0}, {"OMP_NUM_THREADS": "1"}, "ok"),
        ({"threads": 8, "quota": 2.0}, {}, "warning"),
        ({"threads": 16}, {"OMP_NUM_THREADS": "16"}, "warning"),
        ({"threads": 8}, {"OMP_NUM_THREADS": "4,2"}, "ok"),
        ({"threads": 8}, {"OMP_NUM_THREADS": "many"}, "warning"),
        ({"threads": 8}, {"OMP_NUM_THREADS": "0"}, "warning"),
        ({"threads": None, "busy": 8.0}, {}, "ok"),
    ],
)
def test_threads(found, environment, verdict):
    line = machine.check_threads(machine.Cores(cores=8, allowed=8, **found), environment)
    assert line.verdict == verdict and bool(line.remedy) == (verdict == "warning")


def test_busy_cores_are_counted_from_the_systems_ticks():
    before = "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n"
    after = "cpu  150 0 150 900 0 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 6\n"
    assert machine.busy_cores(before, after) == 1.0
    assert machine.busy_cores(before, before) is None and machine.busy_cores("", "") is None
    assert machine.quota_of("150000 100000\n") == 1.5
    assert machine.quota_of("max 100000\n") is None and machine.quota_of("") is None


@pytest.mark.parametrize(
    ("free", "limit", "used", "verdict"),
    [
        (20, "", "", "ok"),
        (1, "", "", "warning"),
        (20, "max", str(2 * GIB), "ok"),
        (20, str(8 * GIB), str(2 * GIB), "ok"),
        (20, str(8 * GIB), str(7 * GIB), "warning"),
    ],
)
def test_memory(free, limit, used, verdict):
    meminfo = f"MemTotal:       {32 << 20} kB\nMemFree: 5 kB\nMemAvailable:   {free << 20} kB\n"
    assert machine.check_memory(meminfo, limit, used).verdict == verdict
    assert machine.check_memory("", limit, used).verdict == "note"


def test_shared_memory_matters_to_several_gpus():
    assert machine.check_shared_memory(8 * GIB, 8 * GIB, gpus=8).verdict == "ok"
    assert machine.check_shared_memory(GIB // 16, GIB // 16, gpus=8).verdict == "warning"
    assert machine.check_shared_memory(GIB // 16, GIB // 16, gpus=1).verdict == "note"
    assert machine.check_shared_memory(None, None, gpus=2).verdict == "warning"


def test_limits():
    assert [line.verdict for line in machine.check_limits(256, 65536)] == ["warning", "note"]
    assert [line.verdict for line in machine.check_limits(-1, -1)] == ["ok", "ok"]


FINE = {"free": 100 * GIB, "total": 200 * GIB, "inodes": 1000, "refusal": ""}


@pytest.mark.parametrize(
    ("name", "changed", "verdict"),
    [
        ("working folder", {}, "ok"),
        ("working folder", {"inodes": None}, "ok"),
        ("working folder", {"free": 10 * GIB}, "ok"),
        ("working folder", {"free": GIB}, "warning"),
        ("working folder", {"free": 1000}, "problem"),
        ("working folder", {"inodes": 0}, "problem"),
        ("Hugging Face cache", {"free": 10 * GIB}, "warning"),
        ("Hugging Face cache", {"refusal": "/cache: Read-only file system"}, "problem"),
        ("metatt_scale cache", {"refusal": "/cache: Permission denied"}, "problem"),
    ],
)
def test_a_folder(name, changed, verdict):
    line = machine.check_folder({"name": name, "path": "/somewhere", **FINE, **changed})
    assert line.verdict == verdict and line.name == name and "/somewhere" in line.found
    assert bool(line.remedy) == (verdict != "ok")


def test_a_folder_without_a_home():
    facts = {"name": "metatt_scale cache", "path": None, "refusal": "RuntimeError: Could not determine home"}
    line = machine.check_folder(facts)
    assert line.verdict == "problem" and "METATT_CACHE" in line.remedy


# ---- printing

LONG = "/a/folder/whose/name/does/not/fit/in/the/width/of/any/terminal/" + "x" * 100
REPORT = (
    ("Versions", [Line(name="torch", found="2.13.0+cpu"), Line(name="metatt_scale cache", found=LONG)]),
    ("Devices", [Line(name="driver", found="a | b [red]c", verdict="problem", remedy="update the driver")]),
)


@pytest.mark.parametrize("width", [80, 60, 59, 40, 200])
def test_nothing_is_cut_at_any_width(width):
    printed = io.StringIO()
    command.show(REPORT, Console(file=printed, width=width, markup=False, emoji=False, highlight=False))
    lines = printed.getvalue().splitlines()
    if width >= 60:
        assert max(map(len, lines)) <= width
        assert all(line.startswith("|") for line in lines[:-1] if line.strip())
        words = "".join(line.rsplit(" | ", 1)[-1].strip(" |") for line in lines)
    else:
        words = "\n".join(lines)
    for text in (LONG, "[red]c", "problem", "torch"):
        assert text in words or text in printed.getvalue()
    assert LONG in words and "1 problem (driver)" in lines[-1]


def test_json_holds_every_line():
    report = json.loads(command.as_json(REPORT))
    assert report["verdict"] == "problem" and len(report["lines"]) == 3
    assert report["lines"][2] == {
        "section": "Devices",
        "name": "driver",
        "found": "a | b [red]c",
        "verdict": "problem",
        "remedy": "update the driver",
    }
