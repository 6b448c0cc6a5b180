"""Records that cannot be learned from, and places that cannot be written to."""

import gzip
import json

from tests.model.bad_input.cases import case, cases, train


def data(name, content, **keys):
    def make(folder):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        return train(folder, data={"train": [{"path": str(path)}], "validation_size": 0, **keys})

    return make


GOOD = {"instruction": "a", "output": "b"}
PACKED = gzip.compress(
    b"".join(json.dumps({"instruction": str(i), "output": "b"}).encode() + b"\n" for i in range(99))
)
cases(
    data,
    [
        ("data missing", ("none.jsonl", None), "none.jsonl' does not exist"),
        ("data of unknown kind", ("data.csv", b"a,b"), "data.csv is of no known kind"),
        ("broken line", ("d.jsonl", b'{"instruction": "a", "output": "b"}\n{"instr'), "d.jsonl:2: line is not JSON"),
        ("missing field", ("d.jsonl", [GOOD, {"instruction": "a"}]), "d.jsonl:2", "no field 'output'"),
        (
            "wrong type",
            ("d.jsonl", [GOOD, GOOD, {"instruction": 1, "output": "b"}]),
            "d.jsonl:3",
            "a number in field",
        ),
        ("record is a list", ("d.jsonl", [[1, 2]]), "d.jsonl:1: record is an array"),
        ("empty answer", ("d.jsonl", [{"instruction": "a", "output": " "}]), "d.jsonl:1", "nothing to learn from"),
        ("file empty", ("d.jsonl", b""), "holds no usable instruction record"),
        ("array empty", ("d.json", b"[]"), "holds no usable instruction record"),
        ("array broken", ("d.json", b'[{"instruction":\n "a"'), "d.json:2: file is not JSON"),
        ("not UTF-8", ("d.jsonl", b'{"instruction": "\xff", "output": "b"}\n'), "d.jsonl:1: line is not UTF-8"),
        ("not a gzip", ("d.jsonl.gz", b"plain text"), "is a damaged gzip file"),
        ("gzip cut short", ("d.jsonl.gz", PACKED[: len(PACKED) // 2]), "is a damaged gzip file"),
        ("gzip with a flipped byte", ("d.jsonl.gz", PACKED[:30] + b"\x00" + PACKED[31:]), "is a damaged gzip file"),
    ],
)


@case("folder without data", "holds no .json")
def _(folder):
    (folder / "empty").mkdir()
    return train(folder, data={"train": [{"path": str(folder / "empty")}]})


@case("nothing is left after the cut", "raise `data.cutoff_length`")
def _(folder):
    (folder / "long.jsonl").write_text(json.dumps({"instruction": "a" * 99, "output": "b"}))
    source = {"train": [{"path": str(folder / "long.jsonl")}], "validation_size": 0, "cutoff_length": 8}
    return train(folder, data=source)


@case("every record is bad and skipped", "no usable instruction record", "d.jsonl:1")
def _(folder):
    return data("d.jsonl", [{"a": 1}] * 3, on_bad_record="skip")(folder)


@case("chat without a template", "the tokenizer has no chat template")
def _(folder):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return data("d.jsonl", [{"messages": turns}], format="chat")(folder)


@case("cache is a file", "token cache", "data.cache_dir")
def _(folder):
    return train(folder, data={"cache_dir": str(folder / "data.jsonl")})


@case("output_dir is a file", "data.jsonl is a file; choose another output_dir")
def _(folder):
    return train(folder, output_dir=str(folder / "data.jsonl"))


@case("output_dir is below a file", "data.jsonl is a file; choose another output_dir")
def _(folder):
    return train(folder, output_dir=str(folder / "data.jsonl" / "a" / "b"))
