"""One rank: load each case's model under its engine, train one step's gradients on it, write what came out.

python -m tests.distributed.workers.loading CASES.json OUT: with several ranks all compute the same batch, so every
rank must find the loss and the gradients of one process.
"""

import json
import logging
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file

from metatt_scale.adapter import inject
from metatt_scale.backbone import load_backbone
from metatt_scale.ending import leave
from metatt_scale.parallel import Launch, join, make_engine
from metatt_scale.recipe import AdapterRecipe, validate
from tests.tiny import MODELS, randomise, tokens

for library in ("bitsandbytes", "DeepSpeed", "deepspeed"):
    logging.getLogger(library).setLevel(logging.ERROR)


def run(case, world):
    """Return the tensors of one case: loss before and after an evaluation, gradients, buffers."""
    data = {"output_dir": "unused", "backbone": case["backbone"], "data": {"train": [{"path": "unused"}]}}
    recipe = validate(data | {"parallel": case.get("parallel", {})}, "loading")
    engine = make_engine(world, Launch(strategy=case["engine"], deepspeed=case.get("deepspeed")), recipe)
    model = load_backbone(recipe.backbone, world.device, seed=3, engine=engine)
    adapter = inject(model, AdapterRecipe(rank=3, target_modules=tuple(MODELS[case["name"]][2])), 0, world.device)
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
    sharded = any(case["engine"] != "replicate" for case in cases)
    with join(torch.device("cpu"), timedelta(minutes=2), group=sharded) as world:
        for case in cases:
            save_file(run(case, world), f"{out}/{case['key']}.{world.rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
