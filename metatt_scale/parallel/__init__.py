"""Several processes: who they are, who holds the frozen backbone, and how the cores stay replicas."""

from metatt_scale.parallel.checks import check_engine, shard_ranks, with_fitting_shards
from metatt_scale.parallel.engine import make_engine
from metatt_scale.parallel.launcher import ContradictionError, Launch, Strategy, offload_device, read_launch
from metatt_scale.parallel.meeting import Place, join, place_in_world
from metatt_scale.parallel.replicas import ReplicasDifferError, check_same
from metatt_scale.parallel.world import Message, OtherRankError, World

__all__ = [
    "ContradictionError",
    "Launch",
    "Message",
    "OtherRankError",
    "Place",
    "ReplicasDifferError",
    "Strategy",
    "World",
    "check_engine",
    "check_same",
    "join",
    "make_engine",
    "offload_device",
    "place_in_world",
    "read_launch",
    "shard_ranks",
    "with_fitting_shards",
]
