"""Ray: trainers as actors, and the master as a named actor that Ray restarts on another node.

    python client/examples/ray/actors.py

A cluster of three nodes on this machine. After some steps the node of the master is killed; Ray starts the master on
the third node, at another address, the trainers find it by its name, and training goes on.
"""

import pathlib
import sys
from typing import Any, List

import ray
import torch

import syncbn
import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch
import local_cluster

NAME, WORKERS, KILL_AFTER = "syncbn/digits", 2, 2


@ray.remote(num_cpus=0, resources={"master": 1}, max_restarts=-1, max_task_retries=-1)
class Master:
    """Wherever Ray creates it anew, it has another address. Across hosts it listens on its node's address, with TLS."""

    def __init__(self) -> None:
        self._master = syncbn.Master("127.0.0.1:0")

    def target(self) -> str:
        return self._master.target

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def find_target() -> str:
    """A worker calls this at each attempt to connect."""
    master = ray.get_actor(NAME, local_cluster.NAMESPACE)  # A variable: some versions of Ray call no temporary.
    return ray.get(master.target.remote(), timeout=10.0)


@ray.remote(num_cpus=1)
class Trainer:
    def __init__(self, rank: int) -> None:
        torch.set_num_threads(1)
        self._worker = syncbn.Worker(find_target, rank=rank, world_size=WORKERS, join_timeout=300.0)
        self._model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model(), self._worker)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=whole_batch.LEARNING_RATE)
        self._batches = whole_batch.batches(rank, WORKERS)

    def step(self, number: int) -> str:
        """Returns: the address of the master that served the step."""
        x, y = self._batches[number]
        self._optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self._model(x), y, reduction="sum").backward()
        syncbn.torch.all_reduce_gradients(self._model, self._worker, weight=len(x))
        self._optimizer.step()
        return self._worker.target

    def finish(self) -> torch.nn.Module:
        self._worker.leave()
        return syncbn.torch.revert_sync_batchnorm(self._model)


def kill_node(cluster: Any, node_id: str) -> None:
    """Ends the processes of a node without a word to the rest of the cluster."""
    (node,) = [node for node in cluster.list_all_nodes() if node.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def main() -> None:
    either = {"num_cpus": 0, "resources": {"master": 1}}  # Either node may have the master, and no trainer.
    with local_cluster.start({"num_cpus": WORKERS}, [either, either]) as cluster:
        master = Master.options(name=NAME, get_if_exists=True, lifetime="detached").remote()
        first = ray.get(master.node.remote())
        trainers: List[Any] = [Trainer.remote(rank) for rank in range(WORKERS)]
        for number in range(whole_batch.STEPS):
            if number == KILL_AFTER:
                kill_node(cluster, first)
            ray.get([trainer.step.remote(number) for trainer in trainers])
        second = ray.get(master.node.remote())
        assert first != second, first
        print(f"the master went from node {first[:8]}, which was killed, to node {second[:8]}")
        models = ray.get([trainer.finish.remote() for trainer in trainers])
        whole_batch.compare(models[0], WORKERS, "Ray actors")


if __name__ == "__main__":
    main()
