"""Every adapter a recipe can name, behind one interface: `metatt_scale.adapter.Adapter`."""

from metatt_scale.methods.build import build_adapter, reload_adapter

__all__ = ["build_adapter", "reload_adapter"]
