"""metatt_scale: fine-tuning of large transformers with one global tensor-train adapter."""

__version__ = "0.1.0"
