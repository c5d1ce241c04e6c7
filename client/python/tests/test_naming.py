"""Layers without a given name: numbered alike at every worker, whichever is used first and whatever wraps the model."""

import concurrent.futures
import copy
import pickle
import threading

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync
from syncbn import _names
from syncbn.torch import compat


def in_other_orders(group, make):
    """Two branches, each on a thread, that two workers first use in different order; their running means at each worker.

    With momentum 1 they are the batches' means: (0 + 1) / 2 for the first branch, (10 + 11) / 2 for the second.
    """

    def run(worker):
        branches = make(worker)
        layers = [layer for branch in branches for layer in branch.modules() if hasattr(layer, "layer")]
        for layer in layers:
            layer.worker = worker  # A thread has no default worker.
        used, declare = threading.Event(), worker.declare_layer

        def declare_and_tell(*arguments, **options):
            declare(*arguments, **options)
            used.set()

        worker.declare_layer = declare_and_tell
        use = lambda index: branches[index](torch.full((2, 1), 10.0 * index + worker.rank))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(use, worker.rank)
            assert used.wait(20)
            use(1 - worker.rank)
            first.result()
        return [float(layer.running_mean) for layer in layers]

    assert group(2, run) == [[0.5, 10.5]] * 2


class Tower(torch.nn.Module):
    """Copies of one block, as transformers make them."""

    def __init__(self, block):
        super().__init__()
        self.blocks = torch.nn.ModuleList([copy.deepcopy(block) for _ in range(2)])

    def __getitem__(self, index):
        return self.blocks[index]

    def __iter__(self):
        return iter(self.blocks)


MAKERS = {
    "with a worker": lambda worker: [sync.SyncBatchNorm(1, momentum=1.0, worker=worker) for _ in range(2)],
    "default worker": lambda worker: [sync.SyncBatchNorm(1, momentum=1.0) for _ in range(2)],
    "both": lambda worker: [sync.SyncBatchNorm(1, momentum=1.0), sync.SyncBatchNorm(1, momentum=1.0, worker=worker)],
    "lazy": lambda worker: [sync.LazySyncBatchNorm(momentum=1.0, worker=worker) for _ in range(2)],
    "compat": lambda worker: [compat.SynchronizedBatchNorm1d(1, momentum=1.0, worker=worker) for _ in range(2)],
    "deep copies": lambda worker: Tower(sync.SyncBatchNorm(1, momentum=1.0, worker=worker)),
    "a copy and its original": lambda worker: Tower(sync.SyncBatchNorm(1, momentum=1.0)),
    "pickled": lambda worker: [pickle.loads(pickle.dumps(sync.SyncBatchNorm(1, momentum=1.0))) for _ in range(2)],
    "adopted": lambda worker: sync.convert_sync_batchnorm(
        torch.nn.Sequential(*[sync.SyncBatchNorm(1, momentum=1.0) for _ in range(2)]), worker
    ),
    "adopted copies": lambda worker: sync.convert_sync_batchnorm(Tower(sync.SyncBatchNorm(1, momentum=1.0)), worker),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_branches_first_used_in_different_order_keep_their_statistics(group, name):
    in_other_orders(group, MAKERS[name])


def test_two_models_of_one_process(group):
    def run(worker):
        models = [torch.nn.Sequential(sync.SyncBatchNorm(1), sync.SyncBatchNorm(1)) for _ in range(2)]
        return [layer.layer for model in models for layer in model]

    names = group(2, run)
    assert names[0] == names[1] and len(set(names[0])) == 4


def test_conversion_names_by_path_and_gives_the_worker(master):
    with syncbn.Worker(master.target, "adoption", 0, 1) as worker:
        model = torch.nn.ModuleDict({"a": sync.SyncBatchNorm(3), "b": torch.nn.Sequential(torch.nn.BatchNorm1d(3))})
        sync.convert_sync_batchnorm(model, worker)
        assert [(m.layer, m.worker) for m in (model["a"], model["b"][0])] == [("a", worker), ("b.0", worker)]
        # A model around it has paths of its own.
        around = sync.convert_sync_batchnorm(torch.nn.Sequential(model))
        assert [m.layer for m in around.modules() if hasattr(m, "layer")] == ["0.a", "0.b.0"]


class Holder(torch.nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        lambda m: compat.DataParallelWithCallback(m),
        lambda m: Holder(module=m),
        lambda m: Holder(_orig_mod=m),
        lambda m: Holder(_fsdp_wrapped_module=m),
        lambda m: Holder(_checkpoint_wrapped_module=m),
        lambda m: Holder(module=Holder(_orig_mod=m)),
        lambda m: torch.optim.swa_utils.AveragedModel(m),
    ],
)
def test_wrappers_are_no_part_of_a_name(wrap):
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    inner[2] = wrap(inner[2])
    model = sync.convert_sync_batchnorm(wrap(inner))
    assert [m.layer for m in model.modules() if hasattr(m, "layer")] == ["1", "2.0"]


def test_a_child_that_is_called_module_among_others_is_part_of_a_name():
    bn = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    model = sync.convert_sync_batchnorm(Holder(module=bn(), other=bn()))
    assert [m.layer for m in model.modules() if hasattr(m, "layer")] == ["module.0", "other.0"]
    model = sync.convert_sync_batchnorm(Holder(_orig_mod=bn(), module=Holder(**{"0": torch.nn.BatchNorm1d(3)})))
    assert len({m.layer for m in model.modules() if hasattr(m, "layer")}) == 2
    model = sync.convert_sync_batchnorm(Holder(_orig_mod=bn(), **{"0": torch.nn.BatchNorm1d(3)}))
    assert [m.layer for m in model.modules() if hasattr(m, "layer")] == ["_orig_mod.0", "0"]


def test_a_name_given_by_hand_that_is_another_layers_place():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), sync.SyncBatchNorm(3, layer="0"))
    with pytest.raises(ValueError, match="1 and 0 would both be layer '0'"):
        sync.convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm1d


def test_numbers_of_two_threads_do_not_meet_in_one_worker(master):
    """Layers that were made on different threads have the same numbers; one worker cannot tell them apart."""
    layers = []

    def make():
        layers.append(sync.SyncBatchNorm(2))

    for _ in range(2):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    assert layers[0].layer == layers[1].layer
    with syncbn.Worker(master.target, "numbers", 0, 1):
        layers[0](torch.ones(2, 2))
        with pytest.raises(ValueError, match="give them names with layer="):
            layers[1](torch.ones(2, 2))
        sync.convert_sync_batchnorm(torch.nn.Sequential(*layers))
        layers[1](torch.ones(2, 2))


def test_workers_that_built_different_models_are_told(group):
    """Neither waits for the other, of which one has made a layer more: both get an error."""

    def run(worker):
        if worker.rank == 0:
            sync.SyncBatchNorm(2, worker=worker)
        layer = sync.SyncBatchNorm(2, worker=worker)
        with pytest.raises(syncbn.Error) as caught:
            layer(torch.ones(2, 2))
        return layer.layer, str(caught.value)

    for name, message in group(2, run):
        assert name in message


def test_names_made_of_others_are_those_of_every_client():
    """The same names as in tests/vocabulary/derived_name_test.cc."""
    assert _names.derived("bn", "/retained") == "bn/retained"
    assert _names.derived("a" * 246, "/retained") == "a" * 246 + "/retained"
    assert _names.derived("a" * 247, "/retained") == "a" * 229 + "~1d4db4a3fed17e6e/retained"
    assert _names.derived("a" * 300) == "a" * 238 + "~ee7717eba7a17e21"
    assert _names.derived("a" * 228 + "\u00e9" * 13, "/retained") == "a" * 228 + "~c4101a41ace45bb5/retained"


def deep_model():
    """Two layers whose paths differ behind their first 300 bytes alone."""
    model = Holder(a=torch.nn.BatchNorm1d(2), b=torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    for _ in range(10):
        model = Holder(**{"a_name_that_tells_what_it_is_for": model})
    return model


def test_paths_longer_than_a_name(group):
    def run(worker):
        model = sync.convert_sync_batchnorm(deep_model(), worker)
        layers = [m for m in model.modules() if hasattr(m, "layer")]
        layers[1].momentum = 1.0
        layers[0](torch.randn(3, 2))
        layers[1](torch.full((2, 2), 4.0 * worker.rank))
        return [m.layer for m in layers], layers[1].running_mean.tolist()

    (names, mean), other = group(2, run)
    assert (names, mean) == other and mean == [2.0, 2.0]
    assert len(set(names)) == 2 and all(len(name) <= 255 for name in names)


def test_copies_of_copies(group):
    """As a search over populations makes them, one of another, for as long as it runs."""

    def run(worker):
        layer = sync.SyncBatchNorm(2, momentum=1.0, worker=worker)
        names = set()
        for _ in range(300):
            layer = copy.deepcopy(layer)
            names.add(layer.layer)
        layer(torch.full((2, 2), 4.0 * worker.rank))
        return len(names), layer.running_mean.tolist()

    assert group(2, run) == [(300, [2.0, 2.0])] * 2


@pytest.mark.parametrize("masked", [(False, False), (False, True), (True, True)])
def test_several_backward_passes_through_a_layer_of_the_longest_name(group, masked):
    """The rounds of later passes have names made of the layer's, also where one worker's are made by the C++ client and
    another's in Python.
    """
    x = torch.tensor([[0.0], [1.0], [5.0], [2.0]], dtype=torch.float64)

    def differentiated(layer, x, mask):
        x = x.clone().requires_grad_()
        y = layer(x, *mask).pow(3).sum()
        first = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return [*first, dx, *torch.autograd.grad(dx.pow(2).sum(), x)]

    def run(worker):
        layer = sync.SyncBatchNorm(1, worker=worker, layer="n" * 255, dtype=torch.float64)
        mask = [torch.ones(2, dtype=torch.bool)] if masked[worker.rank] else []
        return differentiated(layer, x[2 * worker.rank :][:2], mask)

    whole = differentiated(torch.nn.BatchNorm1d(1, dtype=torch.float64), x, [])
    for rank, found in enumerate(group(2, run)):
        for own, expected in zip(found, whole):
            torch.testing.assert_close(own, expected[2 * rank :][:2])
