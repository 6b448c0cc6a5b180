"""A toy fine-tuning run: additions, a three-layer Llama with random weights and a byte-level tokenizer."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.data import prepare
from metatt_scale.methods import build_adapter
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe, validate
from metatt_scale.training.classifier import head_start
from metatt_scale.training.loop import Trainer

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 64}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
BERT = {"model_type": "bert", **_ENCODER}
ROBERTA = {"model_type": "roberta", **_ENCODER, "type_vocab_size": 1}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TIMING = ("seconds", "tokens_per_second", "memory_gib")


def write_toy(folder: Path, *, config: dict = LLAMA, n: int = 80) -> None:
    """Write `folder/model/config.json` and `folder/data.jsonl` (n additions of different lengths)."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    records = [{"instruction": f"{a}+{b}", "output": f"={a + b}"} for a, b in ((i * 7 % 31, i) for i in range(n))]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def toy(folder: Path, **sections) -> dict:
    """A recipe on the toy files as plain data; the keys of `sections` are laid over it."""
    recipe = {
        "output_dir": str(folder / "run"),
        "backbone": {"path": f"random:{folder / 'model'}", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 4.0},
        "data": {
            "train": [{"path": str(folder / "data.jsonl")}],
            "template": "plain",
            "validation_size": 16,
            "cache_dir": str(folder / "cache"),
        },
        "training": {"max_steps": 6, "batch_size": 16, "learning_rate": 1e-2, "save_every": 2, "eval_every": 3},
        "logging": {"every": 1},
    }
    for name, keys in sections.items():
        recipe[name] = {**recipe.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return recipe


def toy_classifier(folder: Path, *, config: dict = BERT, **sections) -> Recipe:
    """A recipe that tells whether the sum of two numbers is even, on the toy model and files it writes."""
    write_toy(folder, config=config)
    records = [{"one": f"{i * 7 % 131}", "two": f"{'0' * (i % 5)}{i}", "label": i * 8 % 131 % 2} for i in range(80)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    wanted = {
        "classifier": {"labels": 2},
        "adapter": {"target_modules": ["query", "value"], "init": "ze-id-id-id"},
        "data": {"format": "sentences", "text_fields": ["one", "two"]},
    }
    for name, keys in sections.items():
        wanted[name] = {**wanted.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return validate(toy(folder, **wanted), "toy")


def toy_recipe(folder: Path, **sections) -> Recipe:
    """The same, checked."""
    if not (folder / "data.jsonl").exists():
        write_toy(folder)
    return validate(toy(folder, **sections), "toy")


def quiet() -> Console:
    """A console that keeps what is printed, for `said`."""
    return Console(file=io.StringIO(), width=500)


def said(console: Console) -> str:
    """What was printed on a quiet console."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def make_trainer(recipe: Recipe, dtype: torch.dtype | None = torch.float32, device: torch.device = CPU) -> Trainer:
    """The trainer that `train` would make, in any dtype (None: as the recipe says)."""
    tokenizer, classes = byte_tokenizer(), recipe.classifier.labels if recipe.classifier else None
    data = prepare(recipe.data, tokenizer, recipe.seed, classes=classes, tasks=recipe.tasks)  # type: ignore[arg-type]
    head = head_start(recipe, data)
    model = load_backbone(recipe.backbone, device, recipe.seed, classes=recipe.head_outputs, head=head)
    if dtype is not None:
        model = model.to(dtype)  # type: ignore[arg-type]
    adapter = build_adapter(model, recipe, World(device=device))
    if dtype is not None:
        adapter = adapter.to(dtype)
    return Trainer(
        recipe=recipe,
        model=model,
        adapter=adapter,
        data=data,
        inputs="digest",
        pad_token_id=0,
        world=World(device=device),
        folder=Path(recipe.output_dir),
        console=quiet(),
    )


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensorboard_scalars(run: Path, name: str) -> dict[int, float]:
    """What TensorBoard was given under a name: {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = run.rglob("events.out.tfevents.*")  # one of the scalars, one of the hyperparameters
    found = (f for f in (EventAccumulator(str(e)).Reload() for e in written) if name in f.Tags()["scalars"])
    return {event.step: event.value for event in next(found).Scalars(name)}


def bits_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [without_clock(line) for line in metrics(folder)]


def without_clock(line: dict) -> dict:
    """The values of a line, and of a sweep in it, that do not depend on the clock."""
    kept = {key: value for key, value in line.items() if key not in TIMING}
    return {key: without_clock(value) if key == "sweep" else value for key, value in kept.items()}


def snapshot(folder: Path) -> dict[str, str]:
    """Hash and kind of everything below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def one_step(trainer: Trainer) -> dict[str, Any]:
    """Do one optimizer step and return its numbers."""
    trainer._launch()
    return trainer._settle()[1]
