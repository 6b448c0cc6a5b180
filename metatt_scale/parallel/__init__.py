"""Several processes: who they are, who holds the frozen backbone, and how the cores stay replicas."""

from metatt_scale.parallel.engine import make_engine
from metatt_scale.parallel.launcher import Launch, Strategy, read_launch
from metatt_scale.parallel.replicas import ReplicasDifferError, check_same
from metatt_scale.parallel.world import Message, OtherRankError, World, join, place_in_world

__all__ = [
    "Launch",
    "Message",
    "OtherRankError",
    "ReplicasDifferError",
    "Strategy",
    "World",
    "check_same",
    "join",
    "make_engine",
    "place_in_world",
    "read_launch",
]
