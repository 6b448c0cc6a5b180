"""Memory of one rank while a backbone of 1.71 billion parameters is loaded, and while it runs.

    python -m tests.distributed.memory --write FOLDER       # 3.3 GiB of random bf16 safetensors, once
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m tests.distributed.memory \\
        --folder FOLDER --engine fsdp2 --quantization nf4   # or --engine replicate, --dtype float16: a conversion

Counted is anonymous memory (RssAnon), sampled every 5 ms: what a process holds for itself, without the pages of
mapped files, which all processes share and the system can drop. Without --folder the weights are made on the way.
"""

import argparse
import json
import logging
import os
import re
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch

from metatt_scale.adapter import inject
from metatt_scale.backbone import load_backbone
from metatt_scale.ending import leave
from metatt_scale.parallel import Launch, join, make_engine
from metatt_scale.recipe import AdapterRecipe, BackboneRecipe, validate

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""60.8 million parameters (116 MiB in bf16) a layer, 1.71 billion in all."""
MIB = 1 << 20


def anonymous():
    """Return the bytes of anonymous memory of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "this kernel does not count anonymous memory"
    return int(found[1]) * 1024


class Peak:
    """The largest anonymous memory inside a `with` block."""

    def __enter__(self):
        self.value, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.005):
            self.value = max(self.value, anonymous())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.value = max(self.value, anonymous())


def held(model):
    """Return the bytes of this rank's part of the weights, and of what quantised layers hold beside them."""
    weights = beside = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            local = getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter))
            weights += local.numel() * local.element_size()
        if state := getattr(module, "quant_state", None):
            beside += state.absmax.numel() * state.absmax.element_size()
            beside += state.state2.absmax.numel() * 4 if state.nested else 0
    return weights, beside


def measure(options, path, world):
    backbone = {"path": path, "quantization": options.quantization, "dtype": options.dtype}
    backbone["quant_storage"] = options.dtype
    data = {"output_dir": "unused", "backbone": backbone, "data": {"train": [{"path": "unused"}]}}
    recipe = validate(data, "memory")
    engine = make_engine(world, Launch(strategy=options.engine), recipe)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(0))
    base, start = anonymous(), time.perf_counter()
    with Peak() as load:
        model = load_backbone(recipe.backbone, world.device, engine=engine)
    seconds, settled = time.perf_counter() - start, anonymous()
    with Peak() as forward, torch.no_grad():
        model(input_ids=ids)
    adapter = inject(model, AdapterRecipe(rank=16), 0, world.device)
    with Peak() as step:
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        adapter.pull_back()
    weights, beside = held(model)
    return {
        "base": base / MIB,
        "shard": weights / MIB,
        "quant state": beside / MIB,
        "load peak": (load.value - base) / MIB,
        "excess": (load.value - base - weights - beside) / MIB,
        "settled": (settled - base) / MIB,
        "forward peak": (forward.value - base) / MIB,
        "forward and backward peak": (step.value - base) / MIB,
        "seconds": seconds,
        "loss": loss.item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FOLDER", help="write random weights there and stop")
    parser.add_argument("--folder", help="safetensors to load")
    parser.add_argument("--engine", choices=["replicate", "fsdp2", "zero3"], default="fsdp2")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="the files' (bfloat16), or to convert to"
    )
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = Path(f"/tmp/metatt_scale_memory_{os.getpid()}.json")
    config.write_text(json.dumps(CONFIG))
    try:
        if options.write:
            model = load_backbone(BackboneRecipe(path=f"random:{config}"), torch.device("cpu"))
            model.save_pretrained(options.write, max_shard_size="500MB")
            return
        with join(torch.device("cpu"), timedelta(minutes=10), group=options.engine != "replicate") as world:
            result = measure(options, options.folder or f"random:{config}", world)
            for rank in range(world.size):
                world.sum(torch.zeros(1))  # one prints after the other
                if rank == world.rank:
                    shown = ", ".join(
                        f"{name} {value:.{6 if name == 'loss' else 0}f}" for name, value in result.items()
                    )
                    print(
                        f"{options.engine} {options.quantization} {options.dtype}, rank {rank} of {world.size}, "
                        f"MiB: {shown}",
                        flush=True,
                    )
    finally:
        config.unlink()


if __name__ == "__main__":
    main()
    leave(0)
