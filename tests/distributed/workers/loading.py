"""One rank: load each case's model under its engine, train one step's gradients on it, write what came out.

python loading.py CASES.json OUT: with several ranks all compute the same batch, so every rank must find the loss and
the gradients of one process.
"""

import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file

from metatt_scale.adapter import inject
from metatt_scale.backbone import load_backbone
from metatt_scale.parallel import join
from metatt_scale.parallel.fsdp2 import Fsdp2
from metatt_scale.parallel.zero3 import Zero3, zero3_config
from metatt_scale.recipe import AdapterRecipe, BackboneRecipe, ParallelRecipe
from tests.tiny import MODELS, randomise, tokens

for library in ("bitsandbytes", "DeepSpeed", "deepspeed"):
    logging.getLogger(library).setLevel(logging.ERROR)


def engine_of(case, world):
    dtype = getattr(torch, case["backbone"]["dtype"])
    match case["engine"]:
        case "none":
            return None
        case "fsdp2":
            return Fsdp2(world, ParallelRecipe(backbone="fsdp2", **case.get("parallel", {})), dtype)
    config = zero3_config(
        case.get("deepspeed"), micro_batch_size=2, accumulation=1, dtype=dtype, world_size=world.size
    )
    return Zero3(world, config, dtype)


def run(case, world):
    """Return the tensors of one case: loss before and after an evaluation, gradients, buffers."""
    recipe = BackboneRecipe(**case["backbone"])
    engine = engine_of(case, world)
    model = load_backbone(recipe, world.device, seed=3, engine=engine)
    adapter = inject(model, AdapterRecipe(rank=3, target_modules=tuple(MODELS[case["name"]][2])), seed=0)
    randomise(adapter)
    ids = tokens()
    with torch.no_grad():
        evaluated = model(input_ids=ids).logits
    model.train()
    losses = []
    for _ in range(2):  # with an evaluation between them, which must change nothing
        for core in adapter.cores:
            core.grad = None
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        adapter.pull_back()
        losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
        model.train()
    out = {"loss": torch.stack(losses), "evaluated": evaluated}
    out |= {f"gradient {k}": core.grad for k, core in enumerate(adapter.cores)}
    out |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    out["parameters held"] = torch.tensor(held(model))
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def held(model):
    """Elements of parameters in this process's memory."""
    local = 0
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            local += parameter.ds_tensor.numel()
        else:
            local += getattr(parameter, "_local_tensor", parameter).numel()
    return local


def main(cases_file, out):
    cases = json.loads(Path(cases_file).read_text())
    with join(
        torch.device("cpu"), timedelta(minutes=2), group=any(case["engine"] != "none" for case in cases)
    ) as world:
        for case in cases:
            results: dict[str, torch.Tensor] = {}
            message = None
            try:
                results = run(case, world)
            except ValueError as error:
                message = str(error)
            stem = f"{out}/{case['key']}.{world.rank}"
            save_file(results, stem + ".safetensors")
            Path(stem + ".json").write_text(json.dumps({"error": message}))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(*sys.argv[1:])
