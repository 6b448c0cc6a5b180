"""A run from recipe to adapter: assembling, the loop, the optimizer, checkpoints, metrics."""

from metatt_scale.training.loop import TrainingStopped
from metatt_scale.training.run import TrainedRun, train

__all__ = ["TrainedRun", "TrainingStopped", "train"]
