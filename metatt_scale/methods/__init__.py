"""Every adapter a recipe can name, behind one interface: `metatt_scale.adapter.Adapter`."""

from metatt_scale.methods.build import build_adapter, find, make_alone, read_alone, reload_adapter

__all__ = ["build_adapter", "find", "make_alone", "read_alone", "reload_adapter"]
