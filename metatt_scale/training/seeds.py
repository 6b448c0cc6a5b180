"""Random numbers that are a pure function of where they are used, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib


def derived_seed(purpose: str, *numbers: int) -> int:
    """Return 32 well-mixed bits of its arguments: torch's CPU generator ignores the upper half of a 64-bit seed."""
    text = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
