"""The names of Synchronized-BatchNorm-PyTorch."""

import pytest

torch = pytest.importorskip("torch")

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
        return model(torch.tensor([[-1.0], [1.0]])).tolist(), model[0].eps_mode

    assert group(1, run) == [([[-0.5], [0.5]], "clamp")]


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
