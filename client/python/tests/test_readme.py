"""The Python of the pages, as it stands there: each block runs, with what the text around it supposes."""

import pathlib
import re
import textwrap
from typing import List, NamedTuple

import pytest

import processes

pytest.importorskip("torch")

ROOT = pathlib.Path(__file__).resolve().parents[3]
PAGES = ("README.md", "client/python/README.md", "docs/operations/slurm-and-ray.md")

# The blocks whose frameworks are not here, by a phrase of each, and what runs the same calls beside the frameworks.
ELSEWHERE = {
    "import detectron2": "client/python/tests/test_weighting.py",
    "# Lightning: ddp": "client/examples/lightning/train.py",
    "syncbn.jax.typed_errors()": "client/python/tests/test_jax_errors.py",
    "syncbn.flax.nnx.convert_sync_batchnorm": "client/examples/flax/train.py",
    "y = layer(x, mask) ": "client/python/tests/test_jax_masks.py",
    "class Master:": "client/examples/ray/actors.py",
    "def find_target():": "client/examples/ray/actors.py",
}


class Case(NamedTuple):
    """A block, by a phrase of it, and the Python before and after it."""

    phrase: str
    before: str
    after: str


# The text supposes these: a network, its optimizer, one batch. `before` is what training has to change.
NETWORK = """
import os, pathlib, torch, torch.distributed
import numpy as np
import syncbn, syncbn.torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
torch.manual_seed(0)
layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images, classes = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
start = layers[0].weight.detach().clone()
"""
PROCESS_GROUP = """
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
"""
STEP = """
optimizer.zero_grad()
cross_entropy(model(images), classes).backward()
optimizer.step()
"""
TRAINED = """
assert isinstance(layers[1], syncbn.torch.SyncBatchNorm)
assert not torch.equal(layers[0].weight, start) and torch.isfinite(layers[0].weight).all()
"""
WORKER = """
worker = syncbn.Worker(rank=0, world_size=1)
"""
TENSORS = """
x, shortcut = torch.randn(5, 64, 3, 3), torch.randn(5, 64, 3, 3)
running_mean, running_var, weight, bias = torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64)
"""
CASES = [
    Case("model = syncbn.torch.weighted_ddp(model)", NETWORK + PROCESS_GROUP, STEP + TRAINED),
    Case("weight=len(x)", NETWORK + "batches = [(images, classes)]", TRAINED),
    Case(
        'init_process_group("gloo")',
        NETWORK + 'os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")',
        STEP + TRAINED,
    ),
    Case("syncbn.torch.init_worker(timeout=60)", NETWORK + PROCESS_GROUP, textwrap.indent(STEP, "    ") + TRAINED),
    Case('activation="relu"', NETWORK + WORKER + TENSORS, "assert y.shape == x.shape and (y >= 0).all() and (y > 0).any()"),
    Case(
        "syncbn.functional.batch_norm",
        NETWORK + WORKER + TENSORS,
        """
assert torch.allclose(mean, x.mean((0, 2, 3), keepdim=True), atol=1e-6)
assert torch.allclose(var, x.var((0, 2, 3), unbiased=False, keepdim=True), atol=1e-6)
assert torch.allclose(y, (x - mean) / (var + 1e-5).sqrt(), atol=1e-5)
""",
    ),
    Case(
        "stream_ordered=True) as worker",
        NETWORK + "syncbn.torch.convert_sync_batchnorm(model); target, rank, n = None, 0, 1",
        TRAINED,
    ),
    Case(
        "with syncbn.Master(",
        NETWORK + "mean, m2, loss = np.arange(3.0), np.ones(3), 2.5",
        "assert merged.count == 8 and (merged.mean == mean).all() and (merged.var == m2 / 8).all() and total[0] == loss",
    ),
    Case(
        'on_worker_lost="wait") as worker',
        NETWORK
        + """
target, rank, steps = None, 0, 2
checkpoint, new = pathlib.Path("checkpoint"), pathlib.Path("new")
def train(step):"""
        + textwrap.indent(STEP, "    "),
        TRAINED + 'assert torch.load(checkpoint)["done"] == 2 and not new.exists()',
    ),
]

# Values in place of the reader's own: the address of the master and the number of workers, which is 1 here.
OWN = {'"10.0.0.1:50051"': "None", "world_size=4": "world_size=1", "    ...\n": "    loss = model(images).sum()\n"}


def blocks() -> List[str]:
    return [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]


def block_with(phrase: str) -> str:
    found = [block for block in blocks() if phrase in block]
    assert len(found) == 1, f"{len(found)} blocks have {phrase!r}"
    return found[0]


def test_every_block_runs_here_or_elsewhere():
    phrases = [*(case.phrase for case in CASES), *ELSEWHERE]
    for block in blocks():
        assert sum(phrase in block for phrase in phrases) == 1, f"one phrase of these tests has to be in:\n{block}"
        compile(block, "page", "exec")
    assert len(phrases) == len(blocks())


@pytest.mark.parametrize("phrase", ELSEWHERE)
def test_what_runs_elsewhere_is_there(phrase):
    block_with(phrase)
    assert (ROOT / ELSEWHERE[phrase]).is_file()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.phrase)
def test_a_block_runs_as_it_stands(master, tmp_path, case):
    block = block_with(case.phrase)
    for theirs, ours in OWN.items():
        block = block.replace(theirs, ours)
    script = f"import os\nos.chdir({str(tmp_path)!r})\n{case.before}\n{block}\n{case.after}\n"
    if "with syncbn.Master(" not in block and "process_group" not in script:
        script = f"import os\nos.environ['SYNCBN_TARGET'] = {master.target!r}\n{script}"
    processes.run(script, 1, SYNCBN_GROUP=tmp_path.name)
