"""Programs that hear of each class that is derived from theirs, to register, check or refuse it, hear of none from a
conversion."""

import abc

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync

CHANNELS = 3


def registered_by_name():
    registry = {}

    class Norm(torch.nn.BatchNorm1d):
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            registry[cls.__name__] = cls

    class Scaled(Norm):
        def forward(self, x):
            return super().forward(x) * 3

    return Scaled, registry


def registered_by_argument():
    registry = {}

    class Norm(torch.nn.BatchNorm1d):
        def __init_subclass__(cls, *, name, **options):
            super().__init_subclass__(**options)
            registry[name] = cls

    class Scaled(Norm, name="Scaled"):
        def forward(self, x):
            return super().forward(x) * 3

    return Scaled, registry


def registered_by_metaclass(base):
    registry = {}

    class Registering(base):
        def __new__(mcs, name, bases, namespace):
            made = super().__new__(mcs, name, bases, namespace)
            registry[name] = made
            return made

        def __init__(cls, name, bases, namespace):
            if any(getattr(ancestor, "final", False) for ancestor in bases):
                raise TypeError(f"{name} is derived from a class that is final")
            super().__init__(name, bases, namespace)

    class Scaled(torch.nn.BatchNorm1d, metaclass=Registering):
        final = True

        def forward(self, x):
            return super().forward(x) * 3

    return Scaled, registry


KINDS = {
    "__init_subclass__": registered_by_name,
    "__init_subclass__ with an argument": registered_by_argument,
    "metaclass": lambda: registered_by_metaclass(type),
    "abstract base classes": lambda: registered_by_metaclass(abc.ABCMeta),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_registers_no_class(group, kind):
    make, registry = KINDS[kind]()
    before = dict(registry)
    x = torch.randn(4, CHANNELS, dtype=torch.float64)
    expected = make(CHANNELS).double()(x)
    layer = make(CHANNELS).double()
    [y] = group(1, lambda worker: sync.convert_sync_batchnorm(layer, worker)(x))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(layer, make) and type(type(layer)) is type(make)
    assert registry == before and registry["Scaled"] is make
    assert type(sync.revert_sync_batchnorm(layer)) is make


def test_an_abstract_class_knows_its_own_instances(group):
    """Not those of another class that was converted before, nor of those that it knows by registration."""
    make, _ = registered_by_metaclass(abc.ABCMeta)
    synchronized = type(sync.convert_sync_batchnorm(make(CHANNELS)))
    make.register(torch.nn.Linear)
    assert isinstance(torch.nn.Linear(1, 1), make)
    assert not isinstance(torch.nn.Linear(1, 1), synchronized)


def test_a_class_derived_from_a_converted_layers_is_heard_of():
    make, registry = registered_by_name()
    synchronized = type(sync.convert_sync_batchnorm(make(CHANNELS)))
    derived = type("Derived", (synchronized,), {})
    assert registry["Derived"] is derived
