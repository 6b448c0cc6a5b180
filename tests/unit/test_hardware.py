"""Which device a process takes: the table of cases, each from what would be found on such a machine."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from metatt_scale import hardware
from metatt_scale.hardware import Gpu, Hardware, choose, driver_version, find_hardware, gpu_index, pick_device
from metatt_scale.recipe import RecipeError

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=79 * 2**30, uuid="GPU-1")
T4 = Gpu(name="Tesla T4", capability=(7, 5), memory=15 * 2**30, uuid="GPU-2")
NODES = ("/dev/nvidia0", "/dev/nvidiactl")
OLD = "The NVIDIA driver on your system is too old (found version 11040)."
CUDA_BUILD = Hardware(torch="2.13.0+cu130", cuda="13.0", threads=2)
CPU_BUILD = Hardware(torch="2.13.0+cpu", threads=2)


def of(base: Hardware, **found) -> Hardware:
    return Hardware(**{**vars(base), **found})


ONE = of(CUDA_BUILD, gpus=(H100,), nodes=NODES, driver="580.65.06", driver_cuda=(13, 0))
EIGHT = of(ONE, gpus=(H100,) * 8)
OLD_DRIVER = of(CUDA_BUILD, nodes=NODES, reason=OLD, driver="470.82.01", driver_cuda=(11, 4))


@pytest.mark.parametrize(
    ("found", "wanted", "environment", "device"),
    [
        (ONE, "auto", {}, "cuda:0"),
        (ONE, "cuda", {}, "cuda:0"),
        (ONE, "cpu", {}, "cpu"),
        (ONE, "auto", {"ACCELERATE_USE_CPU": "true"}, "cpu"),
        (ONE, "auto", {"ACCELERATE_USE_CPU": "false"}, "cuda:0"),
        (of(ONE, gpus=()), "auto", {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (of(ONE, gpus=()), "auto", {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        (of(ONE, gpus=()), "auto", {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "cpu"),
        (ONE, "auto", {"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"),
        (ONE, "auto", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "cuda:0"),
        (EIGHT, "auto", {"LOCAL_RANK": "5"}, "cuda:5"),
        (OLD_DRIVER, "cpu", {}, "cpu"),
        (OLD_DRIVER, "auto", {"ACCELERATE_USE_CPU": "1"}, "cpu"),
        (CUDA_BUILD, "auto", {}, "cpu"),
        (CPU_BUILD, "auto", {}, "cpu"),
        (of(CPU_BUILD, nodes=NODES), "auto", {}, "cpu"),
        (of(CPU_BUILD, others=("MPS",)), "auto", {}, "cpu"),
    ],
)
def test_a_device_is_taken(found, wanted, environment, device):
    assert choose(found, wanted, environment).device == torch.device(device)


@pytest.mark.parametrize(
    ("found", "wanted", "environment", "named"),
    [
        # An old driver names both sides, in torch's words too.
        (OLD_DRIVER, "auto", {}, ["470.82.01", "11.4", "13.0", "too old (found version 11040)", "--device cpu"]),
        (of(OLD_DRIVER, driver_cuda=None), "auto", {}, ["libcuda.so.1"]),
        (of(OLD_DRIVER, driver=None, driver_cuda=None), "auto", {}, ["kernel module"]),
        (of(OLD_DRIVER, driver_cuda=(13, 0), denied=NODES[:1]), "auto", {}, ["may not open /dev/nvidia0"]),
        (of(OLD_DRIVER, driver_cuda=(13, 0)), "auto", {"CUDA_VISIBLE_DEVICES": "9"}, ["CUDA_VISIBLE_DEVICES is '9'"]),
        (of(OLD_DRIVER, driver_cuda=(13, 0)), "auto", {}, ["nvidia-smi"]),
        (CPU_BUILD, "cuda", {}, ["device is cuda", "torch==2.13.0"]),
        (CUDA_BUILD, "cuda", {}, ["device is cuda"]),
        (of(CPU_BUILD, rocm="6.4", nodes=NODES), "cuda", {}, ["ROCm 6.4"]),
        (ONE, "cuda", {"ACCELERATE_USE_CPU": "true"}, ["device is cuda", "ACCELERATE_USE_CPU"]),
        (ONE, "cuda", {"CUDA_VISIBLE_DEVICES": ""}, ["device is cuda", "CUDA_VISIBLE_DEVICES"]),
        (ONE, "auto", {"LOCAL_RANK": "one"}, ["LOCAL_RANK"]),
    ],
)
def test_a_machine_that_cannot_serve_is_named_with_its_cause(found, wanted, environment, named):
    with pytest.raises(RecipeError) as caught:
        choose(found, wanted, environment)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (of(CPU_BUILD, nodes=NODES), ["/dev/nvidia0", "pip install --force-reinstall torch==2.13.0"]),
        (of(CPU_BUILD, rocm="6.4", nodes=NODES), ["ROCm"]),
        (of(CPU_BUILD, others=("MPS", "XPU")), ["MPS", "XPU"]),
    ],
)
def test_a_gpu_that_stays_idle_is_a_warning(found, named):
    (text,) = choose(found, "auto", {}).warnings
    assert all(name in text for name in named)


@pytest.mark.parametrize("found", [ONE, CUDA_BUILD, CPU_BUILD])
def test_an_ordinary_machine_is_no_warning(found):
    assert choose(found, "auto", {}, "bfloat16").warnings == ()


def test_emulated_bfloat16_is_a_warning_and_no_other_dtype():
    old = of(ONE, gpus=(T4,))
    (text,) = choose(old, "auto", {}, "bfloat16").warnings
    assert "backbone.dtype=float16" in text and "7.5" in text
    assert choose(old, "auto", {}, "float16").warnings == choose(old, "cpu", {}, "bfloat16").warnings == ()
    assert not of(old, rocm="6.4").emulates_bfloat16(0)  # AMD's capabilities count otherwise


@pytest.mark.parametrize(
    ("found", "environment", "line"),
    [
        (EIGHT, {"LOCAL_RANK": "1"}, "device: NVIDIA H100 80GB HBM3 (cuda:1, 79 GiB)"),
        (CPU_BUILD, {}, "device: CPU, 2 threads"),
        (of(CPU_BUILD, threads=1), {}, "device: CPU, 1 thread"),
        (ONE, {"ACCELERATE_USE_CPU": "true"}, "device: CPU, 2 threads (ACCELERATE_USE_CPU is true)"),
    ],
)
def test_the_line_names_the_device(found, environment, line):
    assert choose(found, "auto", environment).line == line


TORCHRUN, DEEPSPEED = {"TORCHELASTIC_RUN_ID": "none"}, {"CROSS_SIZE": "1"}


@pytest.mark.parametrize(
    ("count", "rank", "launcher", "index"),
    [
        (8, 7, TORCHRUN, 7),
        (1, 0, TORCHRUN, 0),  # also torchrun --virtual-local-rank, where every LOCAL_RANK is 0
        (2, 2, TORCHRUN, None),
        (1, 1, TORCHRUN, None),
        (1, 1, DEEPSPEED, None),
        (1, 3, {}, 0),  # srun --gpus-per-task=1: each task sees a GPU of its own
        (2, 3, {}, None),
    ],
)
def test_local_rank_and_visible_gpus(count, rank, launcher, index):
    environment = {"LOCAL_RANK": str(rank), **launcher}
    if index is None:
        with pytest.raises(ValueError, match=f"LOCAL_RANK is {rank}"):
            gpu_index(count, environment)
    else:
        assert gpu_index(count, environment) == index


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\nGCC", "470.82.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)", "580.65.06"),
        ("something else\nmore", "something else"),
    ],
)
def test_the_driver_says_its_version(text, version):
    assert driver_version(text) == version


def test_this_machine_is_looked_at():
    found = find_hardware()
    assert found.torch == torch.__version__ and found.threads == torch.get_num_threads()
    assert bool(found.gpus) == torch.cuda.is_available()


def test_the_device_and_its_warnings_are_printed(monkeypatch):
    monkeypatch.setattr(hardware, "find_hardware", lambda: of(CPU_BUILD, others=("XPU",)))
    monkeypatch.setattr(hardware.os, "environ", {})  # tests hide every GPU by a variable
    output = io.StringIO()
    assert pick_device("auto", Console(file=output, width=200)) == torch.device("cpu")
    first, second = output.getvalue().splitlines()
    assert first == "device: CPU, 2 threads" and "XPU" in second


def test_cuda_is_told_which_gpu(monkeypatch):
    """What is made on plain `cuda` goes there too."""
    taken = []
    monkeypatch.setattr(hardware, "find_hardware", lambda: EIGHT)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(hardware.os, "environ", {"LOCAL_RANK": "2"})
    assert pick_device() == torch.device("cuda", 2) and taken == [torch.device("cuda", 2)]
