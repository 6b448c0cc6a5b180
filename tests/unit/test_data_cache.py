import json
import multiprocessing

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metatt_scale.data import prepare, tokenize_source
from metatt_scale.recipe import DataRecipe, DataSource

WORDS = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(50))]


def make_tokenizer(words=WORDS):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def write(path, n=40, first=0):
    lines = (
        {"instruction": f"w{i % 50} ", "output": " ".join(f"w{j}" for j in range(1 + i % 7))}
        for i in range(first, first + n)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSource(path=str(path))


def recipe(tmp_path, *train, **keys):
    return DataRecipe(train=train, template="plain", cache_dir=str(tmp_path / "cache"), **keys)


def tokenize(tmp_path, source, tokenizer=None, **keys):
    """Return table, counts and whether the tokenizer had to work."""
    calls = []
    table, counts, _ = tokenize_source(
        source,
        recipe(tmp_path, source, **keys),
        tokenizer or make_tokenizer(),
        lambda *done: calls.append(done),
    )
    return table, counts, bool(calls)


def same(a, b):
    return all((getattr(a, name) == getattr(b, name)).all() for name in ("tokens", "flags", "offsets"))


def entries(tmp_path):
    return [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_second_start_reads_the_first_ones_tokens(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl")
    first, counts, worked = tokenize(tmp_path, source)
    assert worked and counts["records"] == counts["examples"] == len(first) == 40
    assert first.example(9)[0].tolist() == [WORDS.index(word) for word in ["w9", "w0", "w1", "w2", "<eos>"]]
    monkeypatch.setattr("metatt_scale.data.cache.tokenize_records", None)
    second, again, worked = tokenize(tmp_path, source)
    assert not worked and same(first, second) and again == counts
    assert not second.tokens.flags.owndata and not second.tokens.flags.writeable  # mapped, not read


def test_the_settings_of_a_call_do_not_change_the_key(tmp_path):
    source = write(tmp_path / "a.jsonl")
    tokenize(tmp_path, source)
    tokenizer = make_tokenizer()
    tokenizer(["w1", "w2 w3"], padding=True, truncation=True, max_length=4)
    assert not tokenize(tmp_path, source, tokenizer)[2]


def test_everything_that_decides_tokens_is_in_the_key(tmp_path):
    source = write(tmp_path / "a.jsonl")
    chatty, other_end = make_tokenizer(), make_tokenizer()
    chatty.chat_template = "{{ messages }}"
    other_end.eos_token = "w3"
    tokenize(tmp_path, source)
    for changed in (
        {"cutoff_length": 8},
        {"train_on_inputs": True},
        {"on_bad_record": "skip"},
        {"source": source.model_copy(update={"limit": 3})},
        {"source": source.model_copy(update={"limit": 3, "draw": "random"})},
        {"source": write(tmp_path / "b.jsonl", first=1)},
        {"tokenizer": make_tokenizer([*WORDS[:3], *reversed(WORDS[3:])])},
        {"tokenizer": chatty},
        {"tokenizer": other_end},
    ):
        assert tokenize(tmp_path, **{"source": source, **changed})[2], changed
    assert not tokenize(tmp_path, source)[2]
    source = write(tmp_path / "copy.jsonl")
    assert not tokenize(tmp_path, source)[2]  # the same content under another name


@pytest.mark.parametrize("damage", ["flip", "cut", "no meta", "no tokens", "bad meta", "empty meta"])
def test_a_damaged_entry_is_made_again(tmp_path, caplog, damage):
    source = write(tmp_path / "a.jsonl")
    first, _, _ = tokenize(tmp_path, source)
    expected = [first.example(i)[0].tolist() for i in range(len(first))]
    (folder,) = entries(tmp_path)
    tokens, meta = folder / "tokens.safetensors", folder / "meta.json"
    content = tokens.read_bytes()
    tokens.unlink()  # a new file: the first table keeps the old one mapped
    match damage:
        case "flip":
            tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            tokens.write_bytes(content[:-5])
        case "no tokens":
            pass
        case _:
            tokens.write_bytes(content)
            meta.unlink()
            if damage != "no meta":
                meta.write_text("{" if damage == "bad meta" else "[]")
    again, _, worked = tokenize(tmp_path, source)
    assert worked and "damaged" in caplog.text
    assert [again.example(i)[0].tolist() for i in range(len(again))] == expected
    assert not tokenize(tmp_path, source)[2]


def test_bad_records_stop_or_are_counted(tmp_path, caplog):
    source = write(tmp_path / "a.jsonl")
    with open(source.path, "a") as file:
        file.write("oops\n{}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:41: .*on_bad_record: skip"):
        tokenize(tmp_path, source)
    assert entries(tmp_path) == []
    _, counts, _ = tokenize(tmp_path, source, on_bad_record="skip")
    assert (counts["records"], counts["skipped"]) == (40, 2)
    assert "2 records skipped" in caplog.text and "a.jsonl:41" in caplog.text
    assert tokenize(tmp_path, source, on_bad_record="skip")[1] == counts


def test_a_source_without_anything_to_learn_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl' holds no usable instruction record"):
        tokenize(tmp_path, DataSource(path=str(tmp_path / "empty.jsonl")))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"the first of 1 skipped: .*bad\.jsonl:1"):
        tokenize(tmp_path, DataSource(path=str(tmp_path / "bad.jsonl")), on_bad_record="skip")
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "w1 " * 20, "output": "w2"}))
    with pytest.raises(ValueError, match="cutting at 16 tokens; raise"):
        tokenize(tmp_path, DataSource(path=str(tmp_path / "long.jsonl")), cutoff_length=16)


def test_an_unwritable_cache_names_the_remedy(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot be written .*data\.cache_dir"):
        tokenize(tmp_path, write(tmp_path / "a.jsonl"))


def start_together(tmp_path, barrier):
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    tokenizer = make_tokenizer()
    barrier.wait(60)
    table, _, worked = tokenize(tmp_path, source, tokenizer)
    return worked, len(table), int(table.tokens.sum())


def start_in_child(tmp_path, barrier, queue):
    queue.put(start_together(tmp_path, barrier))


@pytest.mark.slow
def test_two_processes_tokenise_once(tmp_path):
    write(tmp_path / "a.jsonl", 4000)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    child = context.Process(target=start_in_child, args=(tmp_path, barrier, queue))
    child.start()
    worked, *first = start_together(tmp_path, barrier)
    also, *second = queue.get(timeout=60)
    child.join(60)
    assert first == second and first[0] == 4000
    assert {worked, also} == {True, False}
    assert len(entries(tmp_path)) == 1  # no temporary folder is left either


def test_prepare_joins_sources_and_splits_off_validation(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 20, first=30)
    both = recipe(tmp_path, a, b.model_copy(update={"weight": 0.5}), validation_size=10)
    data = prepare(both, make_tokenizer(), seed=1)
    assert data.validation is not None and data.validation.table is data.table and len(data.table) == 50
    trained = np_set(*data.train.members)
    assert trained | set(data.validation.indices.tolist()) == set(range(50))
    assert not trained & set(data.validation.indices.tolist())
    first, second = (np_set(members) for members in data.train.members)
    assert max(first) < 30 <= min(second) and data.train.weights == (1.0, 0.5)
    assert data.counts["train_examples"] == 40 and data.counts["validation_examples"] == 10
    assert data.counts["examples_per_epoch"] == len(first) + round(len(second) / 2)
    assert [part["records"] for part in data.counts["train"]] == [30, 20]
    other = prepare(both, make_tokenizer(), seed=2).validation
    assert other is not None and other.indices.tolist() != data.validation.indices.tolist()


def np_set(*arrays):
    return {int(i) for array in arrays for i in array}


def test_prepare_with_validation_sources_or_none(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 20)
    data = prepare(recipe(tmp_path, a, validation=(b,)), make_tokenizer(), seed=1)
    assert data.validation is not None and len(data.validation.table) == 20
    assert data.validation.indices.tolist() == list(range(20)) and len(data.train) == 30
    assert data.counts["validation"][0]["path"].endswith("b.jsonl")
    assert prepare(recipe(tmp_path, a), make_tokenizer(), seed=1).validation is None
    with pytest.raises(ValueError, match="validation_size` is 30 of 30"):
        prepare(recipe(tmp_path, a, validation_size=30), make_tokenizer(), seed=1)


def test_the_users_cache_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("METATT_CACHE", str(tmp_path / "mine"))
    a = write(tmp_path / "a.jsonl")
    prepare(DataRecipe(train=(a,), template="plain"), make_tokenizer(), seed=0)
    assert len(list((tmp_path / "mine" / "tokens").glob("*/meta.json"))) == 1
