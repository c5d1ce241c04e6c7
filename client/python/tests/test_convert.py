"""Conversion: layers stay whole, or nothing is changed."""

import copy
import io
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune

from conversions import CHANNELS, DOUBLE, KINDS, SEED, Activated, AroundSuper
from conversions import as_on_the_whole_batch, close, filled, step, values


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Attributes, hooks and buffers ----


def test_layers_stay_the_same_objects_with_all_they_carry(group):
    def carrying():
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS), Activated(CHANNELS, 0.2))
        for layer in model:
            layer.note = {"tag": [1]}
            layer.register_buffer("temporary", torch.ones(2), persistent=False)
            layer.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
            layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
            layer.register_forward_hook(lambda module, args, y: y * module.note["tag"][0] * 3)
            layer._register_state_dict_hook(lambda module, state, prefix, metadata: state.update({prefix + "h": module.weight}))
            layer.weight.requires_grad_(False)
        model[1].eval()
        return filled(model)

    models = as_on_the_whole_batch(group, lambda: carrying())
    model = carrying()
    layers, before = list(model), [dict(vars(layer)) for layer in model]
    sync.convert_sync_batchnorm(model)
    assert all(layer is kept for layer, kept in zip(model, layers))
    sync.revert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [torch.nn.BatchNorm1d, Activated]
    assert [vars(layer) for layer in model] == before
    assert [m[1].training for m in models] == [False, False]


def test_backward_hooks_go_on(group):
    def run(worker):
        model, seen = torch.nn.Sequential(torch.nn.BatchNorm1d(2), Activated(2, 0.1)), []
        for layer in model:
            layer.register_full_backward_hook(lambda module, before, after: seen.append(module))
        sync.convert_sync_batchnorm(model, worker)
        model(torch.ones(2, 2, requires_grad=True) * worker.rank).sum().backward()
        return seen == [model[1], model[0]]

    assert group(2, run) == [True, True]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_parametrizations(group, kind):
    def make():
        layer = filled(kind(CHANNELS))
        parametrize.register_parametrization(layer, "weight", Doubled())
        return torch.nn.Sequential(layer)

    for model in as_on_the_whole_batch(group, make):
        assert parametrize.is_parametrized(model[0], "weight") and isinstance(model[0], _BatchNorm)
        copy.deepcopy(model)
        parametrize.remove_parametrizations(model[0], "weight")
        assert not parametrize.is_parametrized(model[0]) and model[0].layer == "0"
        assert type(sync.revert_sync_batchnorm(model)[0]) is kind
    model = make()
    before = type(model[0])
    parametrized = sync.revert_sync_batchnorm(sync.convert_sync_batchnorm(model))[0]
    assert type(parametrized).__name__ == before.__name__ and type(parametrized).__bases__ == (kind,)
    parametrize.remove_parametrizations(parametrized, "weight")
    assert type(parametrized) is kind


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_pruning_and_weight_normalization(group, kind):
    def pruned():
        layer = filled(kind(CHANNELS))
        prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 0.0, 1.0]))
        return torch.nn.Sequential(layer)

    def normed():
        return torch.nn.Sequential(torch.nn.utils.weight_norm(filled(kind(CHANNELS)), "weight", dim=0).double())

    for model in as_on_the_whole_batch(group, pruned):
        prune.remove(model[0], "weight")
        assert float(model[0].weight[1]) == 0.0
    as_on_the_whole_batch(group, normed)


# ---- Copies and pickles ----


def test_copies_and_pickles_of_subclasses(group):
    makes = [KINDS[name] for name in KINDS if name != "slots"]

    def run(worker):
        for index, make in enumerate(makes):
            layer = sync.convert_sync_batchnorm(filled(torch.nn.Sequential(make())), worker, prefix=f"{index} ")[0]
            layer.note = "kept"
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            others = [copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
            others += [pickle.loads(pickle.dumps(layer, protocol=0))]
            others += [torch.load(file, **({"weights_only": False} if torch.__version__ >= "2" else {}))]
            x = torch.full((2, CHANNELS), float(worker.rank), dtype=DOUBLE)
            with torch.no_grad():
                expected = layer(x)
                for other in others:
                    assert type(other) is type(layer) and other.note == "kept" and other.layer == layer.layer
                    assert other.worker is worker and not other.training == (not layer.training)
                    close(other(x), expected)
            assert type(sync.revert_sync_batchnorm(others[1])) is type(make())

    group(2, run)


def test_a_pickle_is_read_in_another_process(tmp_path):
    model = filled(torch.nn.Sequential(Activated(CHANNELS, 0.2), torch.nn.BatchNorm1d(CHANNELS)))
    expected = copy.deepcopy(model).eval()(values((4, CHANNELS)))
    torch.save(sync.convert_sync_batchnorm(model), tmp_path / "model")
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
model = torch.load(sys.argv[1], **({"weights_only": False} if torch.__version__ >= "2" else {}))
import conversions
assert isinstance(model[0], conversions.Activated) and model[0].layer == "0" and model[0].worker is None
conversions.close(model.eval()(conversions.values((4, 3))), torch.load(sys.argv[3]))
assert type(conversions.sync.revert_sync_batchnorm(model)[0]) is conversions.Activated
"""
    torch.save(expected.detach(), tmp_path / "expected")
    folder = __file__.rsplit("/", 1)[0]
    subprocess.run([sys.executable, "-c", script, tmp_path / "model", folder, tmp_path / "expected"], check=True, timeout=120)


# ---- Refusals ----


@torch.jit.script
def scripted(x, mean, var):
    # type: (Tensor, Tensor, Tensor) -> Tensor
    return torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)


class Scripted(torch.nn.BatchNorm1d):
    def forward(self, x):
        return scripted(x, self.running_mean, self.running_var)


def traced():
    class Inlined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = AroundSuper(CHANNELS)

        def forward(self, x):
            return torch.nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)

    return torch.fx.symbolic_trace(Inlined())


REFUSED = {
    "scripted module": (lambda: torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS))), "bad.*TorchScript"),
    "traced module": (
        lambda: torch.jit.trace(torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS)), torch.ones(2, CHANNELS)),
        "bad.*TorchScript",
    ),
    "scripted helper": (lambda: Scripted(CHANNELS), "bad.*'scripted'.*TorchScript"),
    "graph": (traced, "bad.*torch.fx graph.*batch_norm"),
    "process group": (lambda: torch.nn.SyncBatchNorm(3, process_group=object()), "bad has a process group"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_nothing_is_changed_where_something_is_refused(name):
    make, message = REFUSED[name]
    model = torch.nn.ModuleDict({"good": torch.nn.BatchNorm1d(3), "subclass": AroundSuper(3), "bad": make()})
    before = {path: (type(m), dict(vars(m))) for path, m in model.named_modules() if path in ("good", "subclass")}
    with pytest.raises(ValueError, match=message):
        sync.convert_sync_batchnorm(model)
    assert {p: (type(m), dict(vars(m))) for p, m in model.named_modules() if p in before} == before


class Derived(sync.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_revert_is_all_or_nothing():
    model = torch.nn.Sequential(sync.SyncBatchNorm(3), Derived(3))
    with pytest.raises(ValueError, match="1 .*Derived.* was made from SyncBatchNorm"):
        sync.revert_sync_batchnorm(model)
    assert type(model[0]) is sync.SyncBatchNorm


def test_scripts_without_batch_normalization_and_quantized_layers_are_left_alone():
    from torch.ao.nn import quantized

    model = torch.nn.ModuleList([torch.jit.script(torch.nn.ReLU()), quantized.BatchNorm2d(3), torch.nn.BatchNorm2d(3)])
    kinds = [type(m) for m in sync.convert_sync_batchnorm(model)]
    assert kinds[1] is quantized.BatchNorm2d and issubclass(kinds[2], sync.SyncBatchNorm)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_scripting_says_what_to_do_and_a_reverted_copy_is_scripted(kind):
    model = sync.convert_sync_batchnorm(torch.nn.Sequential(filled(kind(CHANNELS)))).eval()
    with pytest.raises(RuntimeError, match="revert_sync_batchnorm"):
        torch.jit.script(model)
    assert isinstance(model[0], sync.SyncBatchNorm if kind is torch.nn.BatchNorm1d else AroundSuper)
    x = values((4, CHANNELS))
    close(torch.jit.trace(model, x)(x), model(x))
    if kind is torch.nn.BatchNorm1d:
        close(torch.jit.script(sync.revert_sync_batchnorm(copy.deepcopy(model)))(x), model(x))


def test_arguments_of_another_type():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))

    class ProcessGroup:
        pass

    for convert in (sync.convert_sync_batchnorm, sync.SyncBatchNorm.convert_sync_batchnorm):
        with pytest.raises(TypeError, match="ProcessGroup.*syncbn.Worker"):
            convert(model, ProcessGroup())
    with pytest.raises(TypeError, match="worker is a syncbn.Worker"):
        sync.SyncBatchNorm(3, worker=ProcessGroup())
    with pytest.raises(TypeError, match="module"):
        sync.convert_sync_batchnorm([model])
    with pytest.raises(TypeError, match="prefix"):
        sync.convert_sync_batchnorm(model, prefix=3)
    with pytest.raises(ValueError, match="eps_mode"):
        sync.convert_sync_batchnorm(model, eps_mode="max")
    with pytest.raises(ValueError, match="numeric"):
        sync.convert_sync_batchnorm(model, numeric="ignore")
    assert type(model[0]) is torch.nn.BatchNorm1d


# ---- Converting again ----


def test_converting_again_takes_what_is_given(master):
    with syncbn.Worker(master.target, "first", 0, 1) as first, syncbn.Worker(master.target, "second", 0, 1) as second:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), AroundSuper(3), sync.SyncBatchNorm(3, layer="own"))
        sync.convert_sync_batchnorm(model, first, eps_mode="clamp")
        sync.convert_sync_batchnorm(model)
        assert [(m.worker, m.eps_mode, m.numeric) for m in model] == [(first, "clamp", "refuse")] * 3
        assert [m.layer for m in model] == ["0", "1", "own"]
        for _ in range(2):
            sync.convert_sync_batchnorm(model, second, eps_mode="add", prefix="g.", numeric="propagate")
            assert [(m.worker, m.eps_mode, m.numeric) for m in model] == [(second, "add", "propagate")] * 3
            assert [m.layer for m in model] == ["g.0", "g.1", "g.own"]
        assert [type(m).__name__ for m in sync.revert_sync_batchnorm(model)] == ["BatchNorm1d", "AroundSuper", "BatchNorm"]


def test_numeric_lets_nan_through_or_refuses_it(group):
    def run(worker):
        x = torch.tensor([[1.0], [float("nan")]])
        for numeric, kind in (("propagate", torch.nn.BatchNorm1d), ("propagate", AroundSuper)):
            layer = sync.convert_sync_batchnorm(kind(1), worker, numeric=numeric, prefix=f"{numeric} {kind.__name__} ")
            assert layer(x).isnan().all()
        assert sync.SyncBatchNorm(1, worker=worker, layer="made", numeric="propagate")(x).isnan().all()
        with pytest.raises(syncbn.NotFinite):
            sync.SyncBatchNorm(1, worker=worker, layer="refused")(x)

    group(1, run)


# ---- Sizes, as in torch ----


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_wrong_sizes_are_runtime_errors(group, name):
    def run(worker):
        layer = sync.SyncBatchNorm(3, worker=worker)
        getattr(layer, name).data = torch.ones(2)
        with pytest.raises(RuntimeError, match=f"{name} has 2 elements, and the layer 3 channels"):
            layer(torch.ones(4, 3))
        with pytest.raises(RuntimeError):
            layer.eval()(torch.ones(4, 3))

    group(1, run)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_shorter_vectors_may_be_assigned(group, kind):
    """Network slimming: num_features keeps its old value."""

    def make():
        layer = kind(CHANNELS + 2).double()
        for name in ("weight", "bias"):
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach()[:CHANNELS].clone()))
        for name in ("running_mean", "running_var"):
            setattr(layer, name, getattr(layer, name)[:CHANNELS].clone())
        return torch.nn.Sequential(layer)

    as_on_the_whole_batch(group, make)


def test_a_missing_counter_without_momentum_leaves_running_statistics(group):
    def make():
        layer = torch.nn.BatchNorm1d(CHANNELS, momentum=None, dtype=DOUBLE)
        layer.num_batches_tracked = None
        return torch.nn.Sequential(layer)

    as_on_the_whole_batch(group, make)


# ---- torch.fx ----


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.act = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), AroundSuper(3)

    def forward(self, x):
        return self.act(self.bn(self.linear(x)).sin())


def test_layers_are_leaves_of_traces_and_go_on_in_them(group):
    """A model traced after its conversion is synchronized like any."""
    x, dy = values((6, 4)), values((6, CHANNELS), SEED + 1)
    whole = filled(Block())
    expected = step(whole, x, dy)
    # On one thread, since a trace patches torch.nn.Module for the whole process.
    models = [torch.fx.symbolic_trace(sync.convert_sync_batchnorm(filled(Block()))) for _ in range(2)]
    for model in models:
        nodes = {node.target for node in model.graph.nodes if node.op == "call_module"}
        assert nodes == {"linear", "bn", "act"}

    def run(worker):
        model = sync.convert_sync_batchnorm(models[worker.rank], worker)
        return step(model, x.split([2, 4])[worker.rank], dy.split([2, 4])[worker.rank])

    for actual, want in zip(zip(*group(2, run)), expected):
        close(torch.cat(actual), want)
    for model in models:
        for name, want in whole.state_dict().items():
            close(model.state_dict()[name], want)


def test_a_graph_of_plain_layers_is_converted(group):
    plain = filled(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)))
    traced = torch.fx.symbolic_trace(plain)
    for model in as_on_the_whole_batch(group, lambda: copy.deepcopy(traced)):
        assert isinstance(getattr(model, "1"), sync.SyncBatchNorm)
