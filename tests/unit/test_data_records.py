import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from metatt_scale.data.records import Fields, read_records, record_problem
from metatt_scale.data.sources import open_source
from metatt_scale.recipe import DataSource

RECORDS = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()


def read(path, *, skip=None, **keys):
    """Read as the cache does: stop at a bad record, or collect the messages in `skip`."""

    def stop(message):
        raise ValueError(message)

    source = DataSource(path=str(path), **keys)
    return list(read_records(open_source(source), "instruction", stop if skip is None else skip.append, source))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "A.JSONL"])
def test_every_kind_of_file(tmp_path, name):
    content = LINES if "jsonl" in name.lower() else ARRAY
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = read(tmp_path / name)
    assert [record for record, _ in found] == RECORDS
    expected = f"{tmp_path / name}:3" if "jsonl" in name.lower() else f"{tmp_path / name}, record 3"
    assert found[2][1] == expected


def test_one_object_per_json_file_and_folders_in_sorted_order(tmp_path):
    for name, record in zip(["c.json", "a.json", "b.json"], RECORDS, strict=False):
        (tmp_path / name).write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("not data")
    assert [record["instruction"] for record, _ in read(tmp_path)] == ["q1", "q2", "q0"]


def test_blank_lines_byte_order_mark_and_line_separators_inside_strings(tmp_path):
    record = {"instruction": "a\u2028b", "output": "c\x85d"}
    text = "\ufeff" + json.dumps(record, ensure_ascii=False) + "\n\n  \r\n" + json.dumps(RECORDS[0])
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    found = read(tmp_path / "a.jsonl")
    assert [r for r, _ in found] == [record, RECORDS[0]]
    assert found[1][1].endswith("a.jsonl:4")


BAD_LINES = {
    b'{"instruction": "x", ': "not JSON",
    b"[1, 2]": "is an array, not a JSON object",
    b'"text"': "is a string",
    b'{"instruction": "x"}': "no field 'output'",
    b'{"instruction": "x", "output": 3}': "a number in field 'output'",
    b'{"instruction": "x", "input": ["y"], "output": "z"}': "an array in field 'input'",
    b'{"instruction": null, "output": "z"}': "null in field 'instruction'",
    b'{"instruction": "x", "output": " \\n"}': "empty 'output'",
    b'{"instruction": "x", "output": "\xff"}': "not UTF-8",
    b'{"instruction": "x", "output": "\\ud83d"}': "unpaired surrogate",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    good = LINES.splitlines()
    path.write_bytes(b"\n".join([*good[:2], line, *good[2:]]))
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ") and BAD_LINES[line] in str(caught.value)
    skipped: list[str] = []
    assert [record for record, _ in read(path, skip=skipped)] == RECORDS
    assert len(skipped) == 1 and "a.jsonl:3" in skipped[0]


def test_a_bad_element_of_an_array_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([RECORDS[0], {"instruction": "x"}, 7]))
    with pytest.raises(ValueError, match=r"a\.json, record 2: record has no field 'output'"):
        read(tmp_path / "a.json")
    skipped: list[str] = []
    assert len(read(tmp_path / "a.json", skip=skipped)) == 1
    assert len(skipped) == 2


def test_null_input_counts_as_none(tmp_path):
    (tmp_path / "a.json").write_text('{"instruction": "x", "input": null, "output": "y"}')
    assert len(read(tmp_path / "a.json")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"instruction": "x",\n "output": "y"},\n oops]', r"a\.json:3: file is not JSON"),
        ("a.json", LINES, r"name it \.jsonl"),
        ("a.json", b'{"instruction":\n "\xff"}', r"a\.json:2: file is not UTF-8"),
        ("a.jsonl.gz", LINES, "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], "damaged gzip"),
        ("a.json.gz", gzip.compress(ARRAY)[:-3], "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(LINES)[:30] + b"\0\1\2\3" + gzip.compress(LINES)[34:], "damaged gzip"),
        ("a.csv", b"x,y", "no known kind"),
    ],
    ids=["syntax", "lines", "bytes", "not gzip", "no trailer", "cut array", "flipped bytes", "csv"],
)
def test_a_broken_file_is_an_error_even_when_records_may_be_skipped(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name, skip=[])
    assert name in str(caught.value)


@pytest.mark.parametrize("path", ["nothing", "./a/b", "/a/b", "a/b/c", "a/b.jsonl", "data/train.json.gz"])
def test_a_missing_path_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would now raise: the hub is not asked
    with pytest.raises(ValueError, match="does not exist") as caught:
        read(path)
    assert repr(path) in str(caught.value)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        read(tmp_path)


def test_limit_counts_usable_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + LINES)
    assert [record for record, _ in read(tmp_path / "a.jsonl", skip=[], limit=2)] == RECORDS[:2]


def test_a_limit_can_be_drawn_from_all(tmp_path):
    many = [{"instruction": f"q{i}", "output": "a"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("oops\n" + "".join(json.dumps(record) + "\n" for record in many))
    drawn = [record for record, _ in read(tmp_path / "a.jsonl", skip=[], limit=20, draw="random")]
    numbers = [many.index(record) for record in drawn]
    assert len(set(numbers)) == 20 and numbers == sorted(numbers) and max(numbers) > 50
    assert drawn == [record for record, _ in read(tmp_path / "a.jsonl", skip=[], limit=20, draw="random")]
    assert len(read(tmp_path / "a.jsonl", skip=[], limit=1000, draw="random")) == 100
    with pytest.raises(ValueError, match="no `limit`; set it"):
        DataSource(path="a.jsonl", draw="random")


def test_hub_ids_go_to_datasets(monkeypatch):
    asked = []

    def load_dataset(path, *, name, split):
        asked.append((path, name, split))
        return iter(RECORDS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read("owner/name", split="test")
    assert [record for record, _ in found] == RECORDS
    assert found[1][1] == "owner/name [test], record 2"
    assert read("owner/name", subset="mrpc", limit=1)[0][1] == "owner/name mrpc [train], record 1"
    assert asked == [("owner/name", None, "test"), ("owner/name", "mrpc", "train")]


def test_a_failure_of_the_hub_is_one_line(monkeypatch):
    def load_dataset(path, *, name, split):
        raise RuntimeError("no such thing\nand a long\ntrace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ValueError, match=r"owner/name mrcp.*RuntimeError: no such thing.*check the spelling"
    ) as caught:
        read("owner/name", subset="mrcp")
    assert "\n" not in str(caught.value)


@pytest.fixture
def glue(tmp_path, monkeypatch):
    """A folder that the library reads as it reads a data set of the hub: two subsets, a test split without labels."""
    datasets = pytest.importorskip("datasets")
    row = {"sentence1": "a", "sentence2": "b", "idx": 7}
    configs = []
    for name in ("cola", "mrpc"):
        (tmp_path / name).mkdir()
        files = [{"split": split, "path": f"{name}/{split}.jsonl"} for split in ("train", "test")]
        configs.append({"config_name": name, "data_files": files})
        for split, label in (("train", 1), ("test", -1)):
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps({**row, "label": label}) + "\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    load = datasets.load_dataset

    def load_dataset(path, **keys):
        assert path == "nyu-mll/glue"
        return load(str(tmp_path), cache_dir=str(tmp_path / "cache"), **keys)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return row


PAIRS = Fields(("sentence1", "sentence2"), "label", 2)


def read_pairs(**keys):
    source = DataSource(path="nyu-mll/glue", **keys)
    return list(read_records(open_source(source), "sentences", fail_on_bad, source, PAIRS))


def fail_on_bad(message):
    raise ValueError(message)


def test_a_subset_is_read_and_what_is_not_asked_for_ignored(glue):
    assert [record for record, _ in read_pairs(subset="mrpc")] == [{**glue, "label": 1}]


def test_a_missing_or_wrong_subset_is_told_with_those_there_are(glue):
    with pytest.raises(ValueError, match=r"has several subsets; .* `subset: cola` \(it has cola, mrpc\)$"):
        read_pairs()
    with pytest.raises(ValueError, match=r"'mrcp' not found\. Available: \['cola', 'mrpc'\]\); check .* `subset`"):
        read_pairs(subset="mrcp")


def test_rows_without_labels_are_refused(glue):
    with pytest.raises(ValueError, match=r"mrpc \[test\], record 1: record has the class -1 .*: name a split"):
        read_pairs(subset="mrpc", split="test")


def test_files_have_no_subsets(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"is on this machine, but has `subset: mrpc`.*; leave it out"):
        read(tmp_path / "a.jsonl", subset="mrpc")


def test_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    first = open_source(DataSource(path=str(path))).identity
    assert open_source(DataSource(path=str(path))).identity == first
    path.write_bytes(LINES + LINES)
    assert open_source(DataSource(path=str(path))).identity != first


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "but has null"),
        ([], "but has an array"),
        (["hello"], "a string as message 1"),
        ([USER, {"role": "assistant"}], "message 2, which has no field 'content'"),
        ([USER, {"role": "assistant", "content": ""}], "empty 'content'"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "an array in field 'content'"),
        ([USER], "no assistant turn"),
        ([ANSWER, USER], "opens with an assistant turn"),
    ],
)
def test_chat_records(messages, message):
    assert message in str(record_problem({"messages": messages}, "chat"))


def test_good_chat_and_text_records():
    assert record_problem({"messages": [USER, ANSWER, USER]}, "chat") is None
    assert record_problem({"text": "x"}, "text") is None
    assert "empty 'text'" in str(record_problem({"text": " "}, "text"))
    assert "no field 'text'" in str(record_problem({}, "text"))


def test_the_real_training_set_is_readable():
    path = Path(__file__).parents[3] / "shared/data/commonsense/train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent: the real data sets lie outside the repository")
    found = read(path, limit=300)
    assert len(found) == 300
    assert all(record["output"].startswith("the correct answer is") for record, _ in found)


# ---- values that Python takes for the same


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("bad", ['{"instruction": "a", "instruction": "b", "output": ""}', '{"x": {"k": 1, "k": 1}}'])
def test_equal_keys_make_one_bad_record(tmp_path, name, bad):
    good = [json.dumps(record) for record in RECORDS]
    lines = [*good[:2], bad, *good[2:]]
    text = ("\n".join(lines) if "jsonl" in name else f"[{','.join(lines)}]").encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(ValueError, match=r"a\.json\S*(:3|, record 3): "):
        read(tmp_path / name)
    skipped = []
    assert [record for record, _ in read(tmp_path / name, skip=skipped)] == RECORDS and len(skipped) == 1


def test_where_tells_true_from_one(tmp_path):
    labels = [True, 1, 1.0, "1", "true", False, 0, None]
    lines = [{**RECORDS[0], "label": label} for label in labels]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for wanted, expected in ((True, [True]), (1, [1, 1.0]), ("1", ["1"]), (False, [False]), (0, [0])):
        found = [record["label"] for record, _ in read(tmp_path / "a.jsonl", where={"label": wanted})]
        assert found == expected and list(map(type, found)) == list(map(type, expected))
    assert read(tmp_path / "a.jsonl", where={"other": 1}) == []


# ---- files that change while they are read


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "folder"])
@pytest.mark.parametrize("limit", [None, 2])
def test_bytes_that_are_not_those_that_were_hashed_are_refused(tmp_path, name, limit):
    """The file has the old records at its start and other ones after them, as in the midst of being overwritten."""
    path = tmp_path / ("b.jsonl" if name == "folder" else name)
    if name == "folder":
        (tmp_path / "a.jsonl").write_bytes(LINES)
    records = [{"instruction": f"q{i}", "output": f"{i:0500}"} for i in range(9000)]

    def write(records):
        text = "".join(json.dumps(r) + "\n" for r in records) if "jsonl" in path.name else json.dumps(records)
        path.write_bytes(gzip.compress(text.encode(), 1) if name.endswith(".gz") else text.encode())

    write(records)
    source = DataSource(path=str(tmp_path if name == "folder" else path), limit=limit and limit + 5)
    opened = open_source(source)
    assert read_records(opened, "instruction", pytest.fail, source)
    write([*records[:-1], {"instruction": "other", "output": "other"}])
    with pytest.raises(ValueError, match=rf"{path.name} changed while it was read"):
        read_records(opened, "instruction", pytest.fail, source)


def test_a_record_that_changes_behind_the_reader_is_refused(tmp_path):
    """In place and while it is read, so that both the first pass and the last record are those of one content."""
    path = tmp_path / "a.jsonl"
    records = [{"instruction": f"q{i}", "output": f"{i:01000}"} for i in range(5000)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = DataSource(path=str(path))
    opened = open_source(source)
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"), opened.read(pytest.fail) as values:
        next(values)
        with path.open("r+b") as file:
            file.seek(4_000_000)
            file.write(b"1")
        list(values)
