"""Every adapter a recipe can name, behind one interface: `metatt_scale.adapter.Adapter`."""

from metatt_scale.methods.build import build_adapter, find, make_alone, read_alone, reload_adapter
from metatt_scale.methods.going_on import check_start, known_tasks

__all__ = [
    "build_adapter",
    "check_start",
    "find",
    "known_tasks",
    "make_alone",
    "read_alone",
    "reload_adapter",
]
