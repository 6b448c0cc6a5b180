"""What is refused before the ranks meet: the launcher's variables, engines that cannot hold a backbone, GPUs."""

import os

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from metatt_scale import cli
from metatt_scale.parallel import Launch, check_engine, place_in_world, with_fitting_shards
from metatt_scale.parallel.meeting import check_alone
from metatt_scale.parallel.zero3 import tell_deepspeed
from metatt_scale.recipe import ParallelRecipe, RecipeError, validate

PLACE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
PLACE |= {"MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    for name in (*PLACE, "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def launch(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_the_place_is_the_launchers(launched):
    assert place_in_world() == (0, 1, 1)
    launched(**PLACE)
    assert place_in_world() == (1, 4, 2)


def test_the_deepspeed_launcher_has_another_name_for_the_node(launched, monkeypatch):
    launched(**PLACE, LOCAL_SIZE="1")
    assert place_in_world().local_size == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert place_in_world().local_size == 1
    monkeypatch.delenv("LOCAL_SIZE")
    assert place_in_world().local_size == 4


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number from 1 on; start with accelerate"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"RANK": "x"}, "RANK is 'x'; it must be a whole number from 0 on"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4, so ranks end at 3"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "99999999"}, "MASTER_PORT is '99999999'; it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_variables_that_no_launcher_sets(launched, changed, message):
    launched(**{**PLACE, **changed})
    with pytest.raises(RecipeError, match=message):
        place_in_world()


def test_an_incomplete_environment_is_refused(launched):
    launched(WORLD_SIZE="2")
    with pytest.raises(RecipeError, match=r"WORLD_SIZE is 2, but RANK, .* is not set; start with"):
        place_in_world()


# ---- engines


def check(strategy, deepspeed=None, size=2, device="cpu", backbone=None, **parallel):
    data = {"output_dir": "unused", "backbone": {"path": "unused", **(backbone or {})}, "parallel": parallel}
    recipe = validate(data | {"data": {"train": [{"path": "unused"}]}}, "test")
    launch = Launch(strategy=strategy, deepspeed=deepspeed, deepspeed_file="ds.json")
    check_engine(launch, recipe, size=size, local_size=2, device=torch.device(device))


def test_zero3_does_not_hold_a_classifier():
    data = {"train": [{"path": "unused"}], "format": "sentences", "text_fields": ["a"]}
    sections = {"backbone": {"path": "unused"}, "data": data, "classifier": {"labels": 2}}
    recipe = validate({"output_dir": "unused", **sections}, "test")
    with pytest.raises(RecipeError, match=r"there is a `classifier`.*set parallel\.backbone: fsdp2 or replicate"):
        check_engine(Launch(strategy="zero3"), recipe, size=2, local_size=2, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "strategy, settings, message",
    [
        (
            "fsdp2",
            {"shard_size": 3},
            r"shard_size is 3 \(3 ranks\), which does not divide the 2 ranks of the job; give",
        ),
        ("fsdp2", {"shard_size": "node", "size": 5}, r"shard_size is node \(2 ranks\), which does not divide the 5"),
        ("fsdp2", {"cpu_offload": True}, "cpu_offload is true, but this run computes on the CPU.*leave it out"),
        ("fsdp2", {"backbone": {"quantization": "int8"}}, "int8, whose layers .*set parallel.backbone: replicate"),
        ("zero3", {"backbone": {"quantization": "int8"}}, "int8, whose layers .*set parallel.backbone: replicate"),
        (
            "zero3",
            {"backbone": {"quantization": "nf4", "quant_storage": "uint8"}},
            "set backbone.quant_storage: bfloat16",
        ),
        ("zero3", {"deepspeed": {"fp16": {"enabled": True}}}, 'ds.json: fp16.enabled is true, but .*; write "auto"'),
        (
            "zero3",
            {"deepspeed": {"bf16": {"enabled": False}}},
            "ds.json: bf16.enabled is false, but backbone.dtype is",
        ),
        (
            "zero3",
            {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/no/such"}}}},
            "ds.json: .*nvme_path is '/no/such', which is no folder; name one",
        ),
    ],
)
def test_what_an_engine_cannot_hold(strategy, settings, message):
    with pytest.raises(RecipeError, match=message):
        check(strategy, **settings)


def test_what_an_engine_can_hold():
    check("replicate", backbone={"quantization": "int8"})
    check("fsdp2", shard_size="node", size=4, backbone={"quantization": "nf4"})
    check("fsdp2", cpu_offload=True, device="cuda")
    check("zero3", {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}})
    check("zero3")


@pytest.mark.parametrize("size, kept", [(4, 2), (6, 2), (3, "world"), (1, "world")])
def test_shards_on_other_ranks(size, kept):
    assert with_fitting_shards(ParallelRecipe(shard_size=2), size, 8).shard_size == kept


# ---- GPUs


def test_two_ranks_on_one_gpu():
    """Also ranks of several machines share a store; a GPU's UUID is its own among all of them."""
    store = HashStore()
    check_alone(store, 0, "GPU-a")
    check_alone(store, 1, "GPU-b")
    check_alone(store, 0, "GPU-a")  # the same rank again
    with pytest.raises(ValueError, match="ranks 1 and 2 have taken the same GPU"):
        check_alone(store, 2, "GPU-b")
    check_alone(store, 3, "")  # PyTorch does not say which GPU it is
    check_alone(store, 4, "")


@pytest.mark.parametrize("device, index", [("cuda:3", "3"), ("cuda:0", "0"), ("cpu", "3")])
def test_deepspeed_takes_the_same_gpu(launched, monkeypatch, device, index):
    monkeypatch.setenv("DS_ACCELERATOR", "gone")  # so that it is gone afterwards, too
    monkeypatch.delenv("DS_ACCELERATOR")
    launched(LOCAL_RANK="3")  # of a batch system that may show each task one GPU only
    tell_deepspeed(torch.device(device))
    assert (os.environ["LOCAL_RANK"], os.environ.get("DS_ACCELERATOR")) == (index, "cpu" if device == "cpu" else None)


# ---- what is printed of it


@pytest.fixture
def fails(monkeypatch):
    """Make `train` raise an error; return its exit code and the seconds it waited before it said so."""

    def run(error):
        def refuse(*_):
            raise error

        waited = []
        monkeypatch.delenv("METATT_DEBUG", raising=False)
        monkeypatch.setattr(cli, "load_recipe", refuse)
        monkeypatch.setattr(cli.time, "sleep", waited.append)
        return cli.main(["train", "unused.yaml"]), waited

    return run


@pytest.mark.parametrize("local_rank, waits", [("0", False), ("1", True)])
@pytest.mark.parametrize("error, by_all", [(RecipeError("bad"), True), (ValueError("bad"), False)], ids=repr)
def test_every_rank_tells_its_error_in_the_end(launched, fails, capsys, local_rank, waits, error, by_all):
    """What all ranks find the first one of a node tells at once; the launcher ends the others while they wait."""
    launched(RANK=local_rank, LOCAL_RANK=local_rank, WORLD_SIZE="2")
    code, waited = fails(error)
    assert code == 2 and bool(waited) == (waits and by_all)
    assert capsys.readouterr().err == f"error on rank {local_rank}: bad\n"


def test_a_rank_without_a_number(launched, fails, capsys):
    launched(WORLD_SIZE="2")
    assert fails(RecipeError("bad"))[0] == 2
    assert capsys.readouterr().err == "error: bad\n"


@pytest.mark.parametrize("number", [28, 122])
def test_a_full_disk_has_a_place_and_a_remedy(fails, capsys, number):
    full = OSError(number, "No space left on device")
    full.filename = "/run/recipe.yaml"
    assert fails(full)[0] == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "error: /run/recipe.yaml: No space left on device; make room and start the same command"
    )


WATCHDOG = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE) ran before timing out."
REMOTE = "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.29\n"
REMOTE += "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
KEY_VALUE = (
    "[1] is setting up NCCL communicator, but store->get('0') got error: wait timeout after 600000ms, keys: /0"
)
NO_ANSWER, GONE = "parallel.timeout_minutes", "another rank is gone"


@pytest.mark.parametrize(
    "text, why",
    [
        ("[gloo] Timed out waiting 6000ms", NO_ANSWER),
        ("[gloo] Connection closed by peer", GONE),
        (WATCHDOG, NO_ANSWER),
        (KEY_VALUE, NO_ANSWER),
        ("NCCL communicator was aborted on rank 0.", GONE),
        (REMOTE, GONE),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("kind", [torch.distributed.DistBackendError, RuntimeError])
def test_a_failed_collective_names_the_key(launched, fails, capsys, kind, text, why):
    launched(**PLACE)
    code, waited = fails(kind(text + "\nC++ stack"))
    message = capsys.readouterr().err
    assert code == 2 and waited and why in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "first, name, last",
    [
        ("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"),
        ("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 50"),
        ("unhandled system error", "ncclSystemError", "Bootstrap : no socket interface found"),
    ],
)
def test_what_fails_in_nccl_on_this_rank_is_told_at_once_with_its_cause(launched, fails, capsys, first, name, last):
    """No other rank tells it."""
    launched(**PLACE)
    text = (
        f"NCCL error in: NCCLUtils.cpp:77, {first}, NCCL version 2.29\n{name}: A call failed.\nLast error:\n{last}\n"
    )
    code, waited = fails(torch.distributed.DistBackendError(text + "Exception raised from create at C++ stack"))
    message = capsys.readouterr().err
    assert code == 2 and not waited and message.count("\n") == 1
    assert all(part in message for part in ("on rank 1", first, last, "NCCL_DEBUG=INFO")) and "C++" not in message


def test_our_own_errors_have_a_traceback_and_end_the_process(monkeypatch, capsys):
    """Before anything is taken down: an engine's process group may wait for ranks that wait for this one."""
    codes = []
    monkeypatch.setattr(cli, "main", lambda _: 1 / 0)
    monkeypatch.setattr(cli, "leave", lambda code: codes.append((code, capsys.readouterr().err)))
    cli.run([])
    ((code, told),) = codes
    assert code == 1 and told.startswith("Traceback") and "ZeroDivisionError" in told
