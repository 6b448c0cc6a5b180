"""How processes of a job find each other: NCCL, gloo, the launcher's variables and what they mean to us."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from metatt_scale.doctor.ask import Answer, no_facts
from metatt_scale.doctor.line import SECRETS, Line, is_secret, split

_FAMILIES = (
    "ACCELERATE_",
    "FSDP_",
    "GLOO_",
    "GOMP_",
    "KMP_",
    "METATT_",
    "NCCL_",
    "OMP_",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
)
_NAMES = frozenset(
    """
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR
    MASTER_PORT CROSS_RANK CROSS_SIZE LOCAL_SIZE DS_ACCELERATOR MKL_NUM_THREADS MKL_THREADING_LAYER
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING NVIDIA_VISIBLE_DEVICES
    HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_NVML_BASED_CUDA_CHECK
    CUBLAS_WORKSPACE_CONFIG BNB_CUDA_VERSION BNB_ROCM_VERSION TORCH_DISTRIBUTED_DEBUG TORCH_EXTENSIONS_DIR
    TORCHINDUCTOR_CACHE_DIR TORCHDYNAMO_DISABLE TRITON_CACHE_DIR TORCH_COMPILE_DISABLE
    SLURM_JOB_ID SLURM_STEP_ID SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS SLURM_NNODES SLURM_NTASKS_PER_NODE
    SLURM_GPUS_ON_NODE SLURM_CPUS_PER_TASK SLURM_MEM_PER_NODE SLURM_RESTART_COUNT PMI_RANK PMI_SIZE
    OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK
    HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE
    HF_DATASETS_CACHE HF_HUB_ENABLE_HF_TRANSFER XDG_CACHE_HOME TOKENIZERS_PARALLELISM MALLOC_MMAP_THRESHOLD_
    MALLOC_ARENA_MAX LD_LIBRARY_PATH LD_PRELOAD PYTHONPATH TMPDIR
    """.split()
)
_LONGEST = 1000


def check_variables(environment: Mapping[str, str]) -> Iterator[Line]:
    """Yield one line for each variable that changes what commands do, and one for the secret ones."""
    names = sorted(name for name in environment if name in _NAMES or name.startswith(_FAMILIES))
    for name in names:
        value = environment[name]
        if is_secret(name) and name not in _NAMES:
            value = "set; its value is not shown"
        elif len(value) > _LONGEST:
            value = f"{value[:_LONGEST]}... ({len(value)} characters)"
        yield Line(name=name, found=value or "set, and empty")
    if not names:
        yield Line(name="variables", found="none is set of those that change what commands do")
    secrets = ", ".join(f"{name} {'set' if environment.get(name) else 'unset'}" for name in SECRETS)
    yield Line(name="secrets", found=f"{secrets}; values are never shown")


def check_launch(answer: Answer, environment: Mapping[str, str]) -> Iterator[Line]:
    """Yield what commands would make of the launcher's variables, and where these contradict each other."""
    if answer.error:
        yield no_facts("launcher", answer)
        return
    for refusal in answer.facts["refusals"]:
        why, remedy = split(refusal)
        yield Line(name="launcher", found=why, verdict="problem", remedy=remedy)
    place, strategy = answer.facts["place"], answer.facts["strategy"]
    if place and strategy:
        one = "one process" if place["size"] == 1 else "rank {rank} of {size}, {local_size} on this node"
        found = f"{one.format(**place)}; the backbone: {strategy} (where a recipe's `parallel` section is empty)"
        note = answer.facts["note"]
        yield Line(name="launcher", found=f"{found}; {note}" if note else found, verdict="note" if note else "ok")
    if place and place["size"] == 1 and (tasks := environment.get("SLURM_NTASKS", "1")) != "1":
        found = f"SLURM_NTASKS is {tasks}, but WORLD_SIZE is not set, so each task would work alone"
        remedy = "start through launch/multinode/slurm.sh, or torchrun under srun"
        yield Line(name="Slurm", found=found, verdict="note", remedy=remedy)


def check_nccl(build: Mapping[str, Any], hardware: Answer) -> Line:
    """Return the line of NCCL, through which GPUs talk."""
    if build["nccl"]:
        return Line(name="NCCL", found=build["nccl"])
    gpus = hardware.facts["gpus"] if hardware.facts else []
    if len(gpus) > 1:
        remedy = "install a PyTorch for CUDA, or use one process"
        return Line(
            name="NCCL", found="not in this PyTorch, but here are several GPUs", verdict="problem", remedy=remedy
        )
    return Line(name="NCCL", found="not in this PyTorch; only several GPUs need it", verdict="note")


def check_gloo(build: Mapping[str, Any], answer: Answer) -> Line:
    """Return the line of gloo, through which processes on CPUs talk: two ranks have met and added up, or not."""
    if not build["gloo"]:
        return Line(
            name="gloo", found="not in this PyTorch", verdict="problem", remedy="install a PyTorch that has it"
        )
    sums = answer.facts["sums"] if answer.facts else [answer.error]
    if sums == [3.0, 3.0]:
        return Line(name="gloo", found="two ranks on this machine meet and add up")
    wrong = next((text for text in sums if isinstance(text, str)), f"the sums are {sums}, not 3")
    remedy = "name a network interface that exists in GLOO_SOCKET_IFNAME (`ip link` lists them; lo for one machine)"
    return Line(
        name="gloo", found=f"two ranks on this machine cannot meet: {wrong}", verdict="problem", remedy=remedy
    )
