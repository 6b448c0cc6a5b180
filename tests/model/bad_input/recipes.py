"""Recipes that cannot be read, or ask for what cannot be."""

from tests.model.bad_input.cases import case, cases, train


@case("no recipe file", "no such recipe", "r.yaml")
def _(folder):
    train(folder)
    return ["train", str(folder / "none.yaml")]


@case("recipe is a folder", "is a folder")
def _(folder):
    return ["train", str(folder)]


@case("recipe is a model file", "not UTF-8")
def _(folder):
    return ["train", str(folder / "run" / "adapter" / "metatt.safetensors")]


def recipe_text(text):
    return lambda folder: train(folder, text=text)


def override(*overrides):
    return lambda folder: train(folder, *overrides)


cases(
    lambda make, *arguments: make(*arguments),
    [
        ("recipe is empty", (recipe_text, ""), "the file is empty"),
        ("recipe is broken YAML", (recipe_text, "a: [1\nb: 2"), "line 2", "not valid YAML"),
        ("recipe builds objects", (recipe_text, "a: !!python/object/apply:os.system [echo]"), "tag"),
        ("recipe lacks keys", (recipe_text, "seed: 1"), "`output_dir` is missing", "`backbone` is missing"),
        ("unknown key", (override, "training.learning_rte=1"), "did you mean `training.learning_rate`"),
        ("word for a number", (override, "training.epochs=two"), '`training.epochs` is "two"; give a whole number'),
        ("override without value", (override, "training.epochs"), "expected dotted.key=value"),
        ("rank too long", (override, "adapter.rank=[4,4,4,4]"), "`rank` has 4 entries", "3 inner bonds"),
        ("rank zero", (override, "adapter.rank=0"), "`rank` is 0; ranks must be at least 1"),
        ("init of three cores", (override, "adapter.init=ze-no-id"), "needs 4 letter pairs"),
        ("init not zero", (override, "adapter.init=no-no-no-id"), "chain that is not zero", "allow_nonzero_start"),
        ("mode order", (override, "adapter.mode_order=[input,layer,output]"), "exactly once"),
        (
            "targets match nothing",
            (override, "adapter.target_modules=[qproj]"),
            "'qproj' matches no module",
            "q_proj",
        ),
        ("target is not linear", (override, "adapter.target_modules=[self_attn]"), "which is not a linear module"),
        ("target outside layers", (override, "adapter.target_modules=[lm_head]"), "belongs to no layer"),
        ("expression matches nothing", (override, "adapter.target_modules=q_proj"), "regular expression"),
        ("expression is broken", (override, "adapter.target_modules='('"), "is not a regular expression"),
        ("layers beyond the model", (override, "adapter.layers=[7,9]"), "the model's layers are 0 to 2"),
        ("validation takes all", (override, "data.validation_size=80"), "leaves nothing to train on"),
        ("best without validation", (override, "data.validation_size=0", "training.keep=best"), "validation records"),
        ("weight gives nothing", (override, "data.train=[{path: data.jsonl, weight: 1e-6}]"), "raise its `weight`"),
        ("no flash attention", (override, "backbone.attention=flash_attention_2"), "needs the package flash-attn"),
    ],
)
