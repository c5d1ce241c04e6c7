"""The names of Synchronized-BatchNorm-PyTorch."""

import collections
import copy
import dataclasses
import types
import typing

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn.torch import compat

SEED = 99


def test_a_converted_model_clamps_epsilon_over_all_workers(group):
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((6, 3, 4, 4), generator=generator, dtype=torch.float64) * 0.1
    var = x.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / var.clamp(min=0.5).sqrt()

    def run(worker):
        model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.BatchNorm2d(3, eps=0.5, dtype=torch.float64)))
        model = compat.convert_model(model, worker)
        assert isinstance(model, compat.DataParallelWithCallback)
        assert type(model.module[0]) is compat.SynchronizedBatchNorm2d
        assert compat.patch_replication_callback(model) is model
        return model(x.split([2, 4])[worker.rank])

    torch.testing.assert_close(torch.cat(group(2, run)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind,rank", [("1d", 2), ("1d", 3), ("2d", 4), ("3d", 5)])
def test_each_kind_takes_its_ranks(group, kind, rank):
    def run(worker):
        layer = getattr(compat, f"SynchronizedBatchNorm{kind}")(2, worker=worker)
        with pytest.raises(ValueError, match="expected"):
            layer(torch.ones([2] * (6 if rank == 5 else 5 if rank == 4 else 4)))
        return layer(torch.ones([2] * rank)).dim()

    assert group(1, run) == [rank]


def test_lazy_layers_are_converted_too(group):
    def run(worker):
        model = compat.convert_model(torch.nn.Sequential(torch.nn.LazyBatchNorm1d(eps=4.0)), worker)
        return model(torch.tensor([[2.0 * worker.rank - 1.0]])).tolist(), model[0].eps_mode

    assert group(2, run) == [([[-0.5]], "clamp"), ([[0.5]], "clamp")]


def test_state_dicts_are_torchs():
    plain = torch.nn.BatchNorm1d(3)
    assert list(compat.SynchronizedBatchNorm1d(3).state_dict()) == list(plain.state_dict())


def test_the_epsilon_mode_can_be_set():
    compat.set_sbn_eps_mode("plus")
    try:
        assert compat.SynchronizedBatchNorm1d(3).eps_mode == "add"
    finally:
        compat.set_sbn_eps_mode("clamp")
    assert compat.SynchronizedBatchNorm1d(3).eps_mode == "clamp"
    with pytest.raises(ValueError):
        compat.set_sbn_eps_mode("max")


# ---- The original's behaviour ----


def test_the_epsilon_mode_acts_on_layers_that_there_are(group):
    """The mode is read when a layer runs. Two values of variance 1, epsilon 4: 1/sqrt(4) clamped, 1/sqrt(5) added."""

    def run(worker):
        layer = compat.SynchronizedBatchNorm1d(1, eps=4.0, worker=worker, layer=mode)
        return float(layer(torch.tensor([[1.0 if worker.rank else -1.0]])).abs())

    made = compat.SynchronizedBatchNorm1d(1)
    try:
        for mode, own, expected in (("clamp", "clamp", 0.5), ("plus", "add", 0.2**0.5)):
            compat.set_sbn_eps_mode(mode)
            assert made.eps_mode == own
            assert group(2, run) == pytest.approx([expected] * 2, rel=1e-6)
    finally:
        compat.set_sbn_eps_mode("clamp")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_replica_of_one_worker_adds_epsilon(group, momentum):
    """In one replica, the original's layer behaves like torch's own."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((4, 2), generator=generator, dtype=torch.float64)
    plain = torch.nn.BatchNorm1d(2, eps=4.0, momentum=momentum, dtype=torch.float64)
    expected = plain(x)

    def run(worker):
        model = compat.convert_model(torch.nn.DataParallel(torch.nn.Sequential(copy.deepcopy(fresh))), worker)
        return model(x), model.module[0].state_dict()

    fresh = torch.nn.BatchNorm1d(2, eps=4.0, momentum=momentum, dtype=torch.float64)
    y, state = group(1, run)[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def test_torchs_names_can_be_patched():
    before = torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d
    with pytest.raises(KeyError):
        with compat.patch_sync_batchnorm():
            assert type(torch.nn.BatchNorm2d(3)) is compat.SynchronizedBatchNorm2d
            assert torch.nn.BatchNorm1d is compat.SynchronizedBatchNorm1d
            assert torch.nn.BatchNorm3d is compat.SynchronizedBatchNorm3d
            raise KeyError
    assert (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d) == before


def test_data_parallel_is_a_data_parallel():
    parallel = compat.DataParallelWithCallback(torch.nn.Linear(2, 2))
    assert isinstance(parallel, torch.nn.DataParallel) and parallel.dim == 0
    assert list(parallel.state_dict()) == ["module.weight", "module.bias"]
    assert compat.convert_model(parallel) is parallel


def test_parallel_models_within_and_patched_ones():
    model = compat.convert_model(torch.nn.Sequential(torch.nn.DataParallel(torch.nn.BatchNorm1d(3))))
    assert type(model[0]) is compat.DataParallelWithCallback
    assert type(model[0].module) is compat.SynchronizedBatchNorm1d and model[0].module.layer == "0"
    parallel = torch.nn.DataParallel(compat.SynchronizedBatchNorm1d(3))
    assert compat.patch_replication_callback(parallel) is parallel
    assert type(parallel) is compat.DataParallelWithCallback and parallel.module.layer == "batch_norm"
    with pytest.raises(TypeError, match="DataParallel"):
        compat.patch_replication_callback(torch.nn.Linear(2, 2))


class Activated(torch.nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_converted_model_keeps_subclasses_and_reverts():
    model = compat.convert_model(torch.nn.Sequential(torch.nn.BatchNorm2d(3), Activated(3)))
    assert isinstance(model[1], Activated) and model[1].eps_mode == "clamp"
    sync.revert_sync_batchnorm(model)
    assert [type(m) for m in model] == [torch.nn.BatchNorm2d, Activated]
    assert type(sync.revert_sync_batchnorm(compat.SynchronizedBatchNorm3d(3))) is torch.nn.BatchNorm3d


# ---- Results of replicas ----


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: torch.Tensor
    scale: float = 2.0


@dataclasses.dataclass
class Derived:
    y: torch.Tensor
    rows: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.rows = self.y.sum(1)


class Ordered(collections.OrderedDict):
    pass


class Encoded(collections.UserDict):
    """A dictionary as the batches of tokenizers are, with an attribute beside its items."""

    def __init__(self, data, encoding=None):
        super().__init__(data)
        self.encoding = encoding


class Attributes(dict):
    """A dictionary whose items are also attributes, as in configuration libraries."""

    __getattr__ = dict.__getitem__


class Itself(dict):
    """The same, the other way to write it."""

    def __init__(self, *items, **more):
        super().__init__(*items, **more)
        self.__dict__ = self


class Listed(list):
    pass


class Pair(typing.NamedTuple):
    y: torch.Tensor
    rest: list


class Tupled(tuple):
    pass


def default(y):
    made = collections.defaultdict(list)
    made["y"] = y
    return made


STRUCTURES = {
    "dataclass": lambda y: Frozen(y),
    "derived field": lambda y: Derived(y),
    "namedtuple": lambda y: Pair(y, [y * 2, None]),
    "subclass of tuple": lambda y: Tupled((y, "same")),
    "subclass of list": lambda y: Listed([y]),
    "OrderedDict": lambda y: collections.OrderedDict(b=y, a=y + 1),
    "subclass of OrderedDict": lambda y: Ordered(b=y, a={"c": (y,)}),
    "defaultdict": default,
    "UserDict": lambda y: collections.UserDict(y=y, same="same"),
    "subclass of UserDict": lambda y: Encoded({"y": y, "z": [y * 2]}, encoding="utf-8"),
    "dictionary with attributes": lambda y: Attributes(y=y),
    "dictionary that is its attributes": lambda y: Itself(y=y),
    "namespace": lambda y: types.SimpleNamespace(y=y, name="same"),
    "array": lambda y: {"y": y, "array": y.numpy()},
    "return type of torch": lambda y: torch.sort(y, dim=1),
    "named of nothing": lambda y: (y, (), {}, None, "text", 3, float("inf"), torch.float32),
}


STRUCTURES["deque"] = lambda x: collections.deque([x, [x * 2]], maxlen=3)


class Returning(torch.nn.Module):
    def __init__(self, structure):
        super().__init__()
        self.structure = structure

    def forward(self, x):
        return self.structure(x)


def plainly(value):
    """A value's type and contents, with tensors as lists."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.tolist()
    if isinstance(value, collections.UserDict):
        return type(value), plainly(vars(value))
    if isinstance(value, dict):
        factory = value.default_factory if isinstance(value, collections.defaultdict) else None
        return type(value), [(key, plainly(item)) for key, item in value.items()], factory
    if isinstance(value, collections.deque):
        return type(value), [plainly(item) for item in value], value.maxlen
    if isinstance(value, (list, tuple)):
        return type(value), [plainly(item) for item in value]
    if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
        return type(value), plainly(vars(value))
    return type(value), value


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_outputs_are_joined_in_their_own_type(name):
    x = torch.arange(14.0).view(7, 2)
    joined = compat.DataParallelWithCallback(Returning(STRUCTURES[name]), replicas=3)(x)
    assert plainly(joined) == plainly(STRUCTURES[name](x))
    if isinstance(joined, (Attributes, Itself)):
        assert joined.y is joined["y"]


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n not in ("array", "return type of torch")])
def test_inputs_are_cut_in_their_own_type(name):
    """Replicas get inputs of the type that the model was given."""
    x = torch.arange(14.0).view(7, 2)
    given = STRUCTURES[name](x)
    kinds = []

    def keep(value):
        kinds.append(type(value))
        return value

    parallel = compat.DataParallelWithCallback(Returning(keep), replicas=3)
    assert plainly(parallel(given)) == plainly(given) and kinds == [type(given)] * 3


def test_slots():
    class Slotted:
        __slots__ = ("y",)

        def __init__(self, y):
            self.y = y

    made = dataclasses.make_dataclass("Made", [("y", torch.Tensor)], namespace={"__slots__": ("y",)})
    x = torch.arange(4.0).view(2, 2)
    assert compat.DataParallelWithCallback(Returning(made), replicas=2)(x).y.equal(x)
    with pytest.raises(TypeError, match="the output differs between the replicas"):
        compat.DataParallelWithCallback(Returning(Slotted), replicas=2)(x)


@pytest.mark.parametrize(
    "structure,place",
    [
        (lambda y: float(y.sum()), "the output"),
        (lambda y: {"y": y, "loss": float(y.sum())}, r"the output\['loss'\]"),
        (lambda y: Frozen(y, scale=float(y.sum())), r"the output\.scale"),
        (lambda y: [y, [str(y)]], r"the output\[1\]\[0\]"),
        (lambda y: [y] * int(y[0, 0] + 1), "the output"),
        (lambda y: {str(float(y[0, 0])): y}, "the output"),
        (lambda y: y if y[0, 0] > 0 else None, "the output"),
        (lambda y: collections.UserList([y]), "the output"),
    ],
)
def test_outputs_that_differ_and_cannot_be_joined(structure, place):
    parallel = compat.DataParallelWithCallback(Returning(structure), replicas=2)
    with pytest.raises(TypeError, match=f"{place} differs between the replicas"):
        parallel(torch.arange(4.0).view(2, 2))


def test_inputs_of_different_lengths_are_refused_and_not_cut_short():
    parallel = compat.DataParallelWithCallback(Returning(lambda pair: pair[0]), replicas=3)
    with pytest.raises(ValueError, match=r"\[1, 6\] rows"):
        parallel((torch.ones(6, 2), torch.ones(1)))
