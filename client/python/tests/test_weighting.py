"""weighted_ddp, install and `python -m syncbn.torch`, in processes of their own."""

import pytest

torch = pytest.importorskip("torch")

import processes

_START = """
import pathlib, sys
import torch, torch.distributed as dist
import syncbn, syncbn.torch
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
DDP = torch.nn.parallel.DistributedDataParallel
"""

_WEIGHTED = """
import copy
functional = torch.nn.functional
sizes = [1, 6, 0]

class Net(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)
        self.kind = kind
    def forward(self, x, y=None):
        logits = self.last(torch.tanh(self.norm(self.first(x))))
        if self.kind == "loss":  # As in models that compute their loss themselves, from outputs that they return as well.
            loss = functional.cross_entropy(logits, y) if len(x) else logits.sum()
            return {"loss": loss, "logits": logits}
        return logits

generator = torch.Generator().manual_seed(88)
x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
y = torch.randint(4, (sum(sizes),), generator=generator)

def gradients(model, x, y):
    model.zero_grad()
    out = model(x, y)
    if isinstance(out, dict):
        loss = out["loss"]
    else:
        loss = functional.cross_entropy(out, y) if len(x) else out.sum()
    penalty = 0.01 * sum(p.square().sum() for p in model.parameters())  # Does not depend on the batch.
    (loss + penalty).backward()
    return [p.grad.clone() for p in model.parameters()]

def distance(found, wanted):
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted))

for kind in ("outputs", "loss"):
    torch.manual_seed(5)
    whole = Net(kind).double()
    wanted = gradients(copy.deepcopy(whole), x, y)
    mine, labels = x.split(sizes)[rank], y.split(sizes)[rank]
    plain = DDP(syncbn.torch.convert_sync_batchnorm(copy.deepcopy(whole), prefix=kind + " plain "))
    assert distance(gradients(plain, mine, labels), wanted) > 1e-3, "batches are too even to tell"
    for inside in (False, True, "twice"):
        model = syncbn.torch.convert_sync_batchnorm(copy.deepcopy(whole), prefix=f"{kind} {inside} ")
        weight = (lambda inputs, kwargs, output: len(labels)) if inside else None
        model = DDP(syncbn.torch.weighted_ddp(model, weight)) if inside else syncbn.torch.weighted_ddp(DDP(model))
        if inside == "twice":  # By a script and by the callback of its framework, say.
            model = syncbn.torch.weighted_ddp(syncbn.torch.weighted_ddp(model))
        found = distance(gradients(model, mine, labels), wanted)
        assert found < 1e-12, (kind, inside, found)
        with torch.no_grad():
            if rank == 0:  # Without gradients there is no sum of weights: a rank may evaluate alone.
                model.module.eval()(mine, labels)
        model.train()

class Strange:
    def __init__(self, tensor):
        self.tensor = tensor
class Returns(torch.nn.Linear):
    def forward(self, x):
        return Strange(super().forward(x))
for weight, words in ((lambda *_: -1.0, "weight is -1.0"), (None, "Strange")):
    model = syncbn.torch.weighted_ddp(Returns(3, 1).double(), weight)
    try:
        model(x)
    except (ValueError, TypeError) as error:
        assert words in str(error), error
    else:
        raise SystemExit(f"no error about {words}")
"""


def test_uneven_batches_with_mean_losses(tmp_path):
    processes.run(_START + _WEIGHTED, 3, tmp_path, MASTER_ADDR="127.0.0.1")


_FRAMEWORK = """
from torch import nn
from torch.nn import SyncBatchNorm as Taken
def make(channels):
    return nn.SyncBatchNorm(channels)
"""

_INSTALLED = """
import sys, warnings
sys.path.insert(0, sys.argv[3])
import torch, torch.distributed as dist
import syncbn, syncbn.torch
rank, world = int(sys.argv[1]), int(sys.argv[2])
torchs = torch.nn.SyncBatchNorm
syncbn.torch.install()
syncbn.torch.install()
import framework
assert framework.Taken is syncbn.torch.SyncBatchNorm
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}/store", rank=rank, world_size=world)
model = torch.nn.Sequential(framework.make(2), torch.nn.BatchNorm1d(2, affine=False)).double()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model))
x = torch.arange(8.0, dtype=torch.float64).reshape(4, 2).exp() % 5
expected = torch.nn.functional.batch_norm(x, None, None, training=True)
expected = torch.nn.functional.batch_norm(expected, None, None, training=True)
torch.testing.assert_close(model(x.split([1, 3])[rank]), expected.split([1, 3])[rank])
reverted = syncbn.torch.revert_sync_batchnorm(syncbn.torch.convert_sync_batchnorm(torchs(3)))
assert type(reverted) is torchs and reverted.process_group is None
syncbn.torch.uninstall()
assert torch.nn.SyncBatchNorm is torchs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sys.modules["framework"].Taken = torchs
    sys.modules["framework"].SyncBatchNorm = torchs
    syncbn.torch.install()
assert any("framework had torch.nn.SyncBatchNorm" in str(w.message) for w in caught), caught
"""


def test_installed_where_programs_look_for_torchs_class(tmp_path):
    (tmp_path / "framework.py").write_text(_FRAMEWORK)
    processes.run(_INSTALLED, 2, tmp_path, MASTER_ADDR="127.0.0.1")


_SCRIPT = """
import sys, torch
import beside
assert __name__ == "__main__"
print(torch.nn.SyncBatchNorm.__module__, sys.argv[1:], beside.VALUE)
"""


def test_a_program_run_by_the_module(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "train.py").write_text(_SCRIPT)
    source = """
import os, subprocess, sys
os.chdir(sys.argv[3])
for program in (["train.py"], ["-m", "train"]):
    print(subprocess.check_output([sys.executable, "-m", "syncbn.torch", *program, "--steps", "3"], text=True).strip())
done = subprocess.run([sys.executable, "-m", "syncbn.torch"], stderr=subprocess.PIPE, text=True)
assert done.returncode == 1 and "usage: python -m syncbn.torch" in done.stderr
"""
    (output,) = processes.run(source, 1, tmp_path)
    assert output.splitlines() == ["syncbn.torch.modules ['--steps', '3'] 7"] * 2, output


_SPAWNING = """
import multiprocessing, sys
from torch.nn import SyncBatchNorm
def kind(_):
    return SyncBatchNorm(2).__class__.__module__
if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, *pool.map(kind, [0]))
    sys.modules["syncbn"].torch.uninstall()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("uninstalled", *pool.map(kind, [0]))
"""


@pytest.mark.parametrize("program", ["train.py", "-m train"])
def test_processes_that_the_program_starts_have_the_same_class(tmp_path, program):
    (tmp_path / "train.py").write_text(_SPAWNING)
    source = """
import os, subprocess, sys
os.chdir(sys.argv[3])
print(subprocess.check_output([sys.executable, "-m", "syncbn.torch", *sys.argv[4].split()], text=True).strip())
"""
    (output,) = processes.run(source, 1, tmp_path, program)
    ours = [f"{method} syncbn.torch.modules" for method in ("fork", "spawn", "forkserver")]
    assert output.splitlines() == [*ours, "uninstalled torch.nn.modules.batchnorm"], output


def test_a_program_that_has_the_package_on_a_path_of_its_own_starts_processes(tmp_path):
    (tmp_path / "train.py").write_text(_FOLDER + _SPAWNING)
    source = """
import os, pathlib, subprocess, sys
import syncbn
os.environ["FOLDER"] = str(pathlib.Path(syncbn.__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in os.environ["PYTHONPATH"].split(os.pathsep) if p != os.environ["FOLDER"])
print(subprocess.check_output([sys.executable, sys.argv[3] + "/train.py"], text=True).strip())
"""
    (output,) = processes.run(source, 1, tmp_path)
    assert "spawn syncbn.torch.modules" in output.splitlines(), output


_FOLDER = """
import os, sys
if __name__ == "__main__":
    sys.path.insert(0, os.environ["FOLDER"])
    import syncbn.torch
    syncbn.torch.install()
"""
