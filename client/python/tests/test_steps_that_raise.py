"""A step that raises on one worker alone, between two layers: it is behind the others, until they agree."""

import copy
import threading

import pytest
import syncbn

torch = pytest.importorskip("torch")

import syncbn.torch as sync  # noqa: E402

PHASES = ("forward", "backward", "sum")


def agreed(states):
    """The greatest number of each layer and phase, as the README of the package has it."""
    layers = {layer for state in states for layer in state["next"]}
    following = {
        layer: {phase: max(state["next"].get(layer, {}).get(phase, 0) for state in states) for phase in PHASES}
        for layer in layers
    }
    return {"first": max(state["first"] for state in states), "next": following}


@pytest.mark.parametrize("where", ["forward", "before backward"])
def test_workers_that_agree_on_their_numbers_go_on(group, where):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    exchange, together = {}, threading.Barrier(2)

    def run(worker):
        synchronized = sync.convert_sync_batchnorm(copy.deepcopy(model), worker)
        failed = []
        for step in range(4):
            raises = step == 1 and worker.rank == 0
            try:
                hidden = synchronized[0](torch.randn(4, 3))
                if raises and where == "forward":
                    raise KeyError("a batch that is missing")
                y = synchronized[2](synchronized[1](hidden))
                if raises:
                    raise KeyError("a loss that cannot be computed")
                y.sum().backward()
            except (KeyError, syncbn.DeadlineExceeded) as error:
                failed.append((step, type(error)))
                exchange[worker.rank] = worker.state_dict()
                together.wait(60)
                worker.load_state_dict(agreed(list(exchange.values())))
        return failed

    # Long enough for a busy machine, whose other rounds must not fail.
    assert group(2, run, timeout=10.0) == [[(1, KeyError)], [(1, syncbn.DeadlineExceeded)]]
