"""A run from recipe to adapter: assembling, the loop, the optimizer, checkpoints, metrics."""

from metatt_scale.training.run import TrainedRun, train
from metatt_scale.training.signals import TrainingStopped

__all__ = ["TrainedRun", "TrainingStopped", "train"]
