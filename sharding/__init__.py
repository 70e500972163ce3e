"""Embedding tables on a mesh of devices: which rows live where, how ids and vectors travel."""

from sharding.embedding import ShardedTables
from sharding.errors import InputError
from sharding.jagged import KeyedJagged
from sharding.mesh import make_mesh
from sharding.plan import Placement, ShardingPlan, one_device_plan
from sharding.route import Routed
from sharding.state import TableState
from sharding.tables import FeatureSpec, Initializer, TableSpec
from sharding.vectors import Embeddings

__all__ = [
    "Embeddings",
    "FeatureSpec",
    "Initializer",
    "InputError",
    "KeyedJagged",
    "Placement",
    "Routed",
    "ShardedTables",
    "ShardingPlan",
    "TableSpec",
    "TableState",
    "make_mesh",
    "one_device_plan",
]
