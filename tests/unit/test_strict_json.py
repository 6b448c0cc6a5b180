"""Equal keys in an object, which Python's own JSON reader passes over."""

import json

import pytest

from metatt_scale.strict_json import EqualKeysError, is_unicode, loads, loads_elements

GOOD = {"a": [1, 2.5, None, {"b": "ä", "c": {}}], "d": True}


def test_good_values_are_those_of_json():
    text = json.dumps(GOOD)
    assert loads(text) == loads(text.encode()) == GOOD and loads_elements(text) == [GOOD]
    assert loads_elements(f"[{text}, 1, []]") == [GOOD, 1, []] and loads_elements("[]") == []


@pytest.mark.parametrize("text", ['{"k": 1, "k": 1}', '[{"a": {"k": 1, "b": 2, "k": 3}}]', r'{"k": 1, "\u006b": 2}'])
def test_equal_keys_are_refused_and_named(text):
    with pytest.raises(EqualKeysError, match="'k'"):
        loads(text)


def test_equal_keys_spoil_one_element():
    inside = ('{"k": 1, "k": 2}', '{"a": {"k": 1, "k": 2}}', '{"a": [[{"k": 1, "k": 2}]]}', '[{"k": 1, "k": 2}]')
    for bad in inside:
        before, spoilt, after = loads_elements(f'[{{"a": 1}}, {bad}, {{"a": 2}}]')
        assert (before, after) == ({"a": 1}, {"a": 2}) and isinstance(spoilt, EqualKeysError)
    (alone,) = loads_elements(inside[0])
    assert isinstance(alone, EqualKeysError)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": ' * 100_000, "1" * 5000])
def test_what_cannot_be_read_is_a_value_error(text):
    for read in (loads, loads_elements):
        with pytest.raises(ValueError, match=r"."):
            read(text)


def test_half_a_surrogate_pair_is_found_anywhere():
    half = json.loads(r'"\ud800"')
    for value in (half, {"a": [{"b": half}]}, {half: 1}):
        assert not is_unicode(value)
    assert is_unicode({"a": ["\U0001f600", 1, None]}) and is_unicode("ä")
