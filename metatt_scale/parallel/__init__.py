"""Several processes: who they are, who holds the frozen backbone, and how the cores stay replicas."""

from metatt_scale.parallel.world import OtherRankError, World, join, place_in_world

__all__ = ["OtherRankError", "World", "join", "place_in_world"]
