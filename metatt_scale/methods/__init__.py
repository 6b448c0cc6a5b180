"""Every adapter a recipe can name, behind one interface: `metatt_scale.adapter.Adapter`."""

from metatt_scale.methods.build import build_adapter, reload_adapter
from metatt_scale.methods.low_rank import merged_layers, peft_files
from metatt_scale.methods.size import trained_values

__all__ = ["build_adapter", "merged_layers", "peft_files", "reload_adapter", "trained_values"]
