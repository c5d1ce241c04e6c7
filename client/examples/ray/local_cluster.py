"""A cluster of Ray on this machine, for the examples; a real one is there already, and `ray.init()` finds it."""

import contextlib
import os
import pathlib
import sys
from typing import Any, Dict, Iterator, Sequence

import ray
import ray.cluster_utils

NAMESPACE = "training"


@contextlib.contextmanager
def start(head: Dict[str, Any], others: Sequence[Dict[str, Any]] = ()) -> Iterator[Any]:
    """Runs a cluster, and connects this program to it. Each node is given as the arguments of `Cluster.add_node`.

    Yields: the ray.cluster_utils.Cluster.
    """
    examples = str(pathlib.Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([examples, *sys.path])  # The nodes' processes inherit it.
    # Without what the examples do not use: a node gives its processes 15 seconds to start.
    least = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={**least, **head})
    try:
        # While there is one node, this program belongs to that: each node that comes later may be killed.
        ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False)
        for node in others:
            cluster.add_node(wait=False, include_log_monitor=False, **node)
        cluster.wait_for_nodes(timeout=300)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
