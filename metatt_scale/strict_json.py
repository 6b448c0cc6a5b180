"""JSON that is refused where Python's own reader takes it: a key twice in an object, of which it keeps the last."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Pairs = list[tuple[str, Any]]


class EqualKeysError(ValueError):
    """An object that has a key twice."""

    def __init__(self, key: str) -> None:
        """Name the key."""
        super().__init__(f"the key {key[:80]!r} stands twice in one object; keep one of them")


def loads(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the JSON; bytes are UTF-8, -16 or -32.
        parse_constant: called with NaN, Infinity and -Infinity, as in `json.loads`.

    Raises:
        EqualKeysError: an object has a key twice.
        ValueError: no JSON, too deeply nested, or a number that Python does not read.
    """
    return _loads(text, _refuse_equal_keys, parse_constant)


def loads_elements(text: str) -> list[Any]:
    """Return the elements of a JSON array, or of another value the value alone.

    An element with equal keys anywhere inside is an `EqualKeysError` in the list: it may be one bad record of many.

    Raises:
        ValueError: no JSON, too deeply nested, or a number that Python does not read.
    """
    found: list[EqualKeysError] = []

    def mark(pairs: Pairs) -> Any:
        try:
            record = _refuse_equal_keys(pairs)
        except EqualKeysError as error:
            found.append(error)
            return error
        return (_first_error(list(record.values())) if found else None) or record

    value = _loads(text, mark)
    elements = value if isinstance(value, list) else [value]
    return [_first_error(element) or element for element in elements] if found else elements


def is_unicode(value: Any) -> bool:
    """Return whether a text, or every text in a JSON value, is valid Unicode.

    JSON can spell half of a surrogate pair, and so can bytes of the command line; tokenizers refuse it.
    """
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _loads(
    text: str | bytes, make_object: Callable[[Pairs], Any], parse_constant: Callable[[str], Any] | None = None
) -> Any:
    try:
        return json.loads(text, object_pairs_hook=make_object, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _refuse_equal_keys(pairs: Pairs) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise EqualKeysError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found


def _first_error(value: Any) -> EqualKeysError | None:
    """Return the error that stands for a value or is inside its lists; one inside an object stands for it."""
    if isinstance(value, list):
        return next(filter(None, map(_first_error, value)), None)
    return value if isinstance(value, EqualKeysError) else None
