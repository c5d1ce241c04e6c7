"""Masters and workers of programs that fork: masters have a process of their own, and workers refuse at once."""

import os
import pathlib
import pickle
import select
import signal
import subprocess
import sys
import zipfile

import pytest

import syncbn
from syncbn import _library

import processes

LIMIT = 240  # Seconds, for a program on a busy machine.


def run(tmp_path, source, *arguments, **options):
    """(exit code, output) of a program, which is a file, as spawn and forkserver need it."""
    script = tmp_path / "program.py"
    script.write_text(source)
    package = str(pathlib.Path(syncbn.__file__).parents[1])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([package, *sys.path]))
    environment.update(options.pop("environment", {}))
    done = subprocess.run(
        [sys.executable, *options.pop("flags", []), str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={name: value for name, value in environment.items() if value is not None},
        **options,
    )
    return done.returncode, done.stdout, done.stderr


_NATURAL = """
import multiprocessing, sys
import syncbn

def train(target, rank, results):
    with syncbn.Worker(target, rank=rank, world_size=3, timeout=200) as worker:
        merged = worker.synchronize("layer", 1, [float(rank)], [0.0])
        results.put((rank, float(merged.mean[0]), float(worker.all_reduce("sum", [rank + 1.0])[0])))

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    results = context.Queue()
    with syncbn.Master() as master:
        trainers = [context.Process(target=train, args=(master.target, rank, results)) for rank in range(3)]
        for trainer in trainers:
            trainer.start()
        found = sorted(results.get() for _ in trainers)
        for trainer in trainers:
            trainer.join()
        print(found, [trainer.exitcode for trainer in trainers])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_master_in_the_parent_and_trainers_as_its_children(tmp_path, method):
    code, output, errors = run(tmp_path, _NATURAL, method)
    assert (code, output) == (0, f"{[(rank, 1.0, 6.0) for rank in range(3)]} [0, 0, 0]\n"), errors


_POOL = """
import concurrent.futures, multiprocessing, sys
import syncbn

def train(arguments):
    target, group, rank = arguments
    with syncbn.Worker(target, group, rank, 2, timeout=200) as worker:
        return float(worker.all_reduce("sum", [rank + 1.0])[0])

if __name__ == "__main__":
    with syncbn.Master() as master:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for step in range(3):  # The processes of a pool are used again.
                print(pool.map(train, [(master.target, f"pool {step}", rank) for rank in range(2)], chunksize=1))
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            print(list(pool.map(train, [(master.target, "executor", rank) for rank in range(2)])))
"""


def test_pools_of_forked_processes(tmp_path):
    code, output, errors = run(tmp_path, _POOL)
    assert (code, output) == (0, "[3.0, 3.0]\n" * 4), errors


_WAITS_FOR_ALL_CHILDREN = """
import os, syncbn
master = syncbn.Master()
for rank in range(2):
    if os.fork() == 0:
        with syncbn.Worker(master.target, rank=rank, world_size=2, timeout=200) as worker:
            total = worker.all_reduce("sum", [1.0])[0]
        os._exit(0 if total == 2.0 else 1)
codes = []
try:
    while True:
        codes.append(os.wait()[1])
except ChildProcessError:
    print(codes)
"""


def test_the_master_is_no_child_that_a_program_waits_for(tmp_path):
    code, output, errors = run(tmp_path, _WAITS_FOR_ALL_CHILDREN)
    assert (code, output) == (0, "[0, 0]\n"), errors


def wait_until_ended(pid):
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        assert waiting.poll(LIMIT * 1000), f"process {pid} goes on"
    finally:
        os.close(descriptor)


_WITH_CHILDREN = """
import os, signal, syncbn, sys, time
master = syncbn.Master()
if os.fork() == 0:  # Keeps everything that it inherits, for as long as it may.
    sys.stdin.read()
    os._exit(0)
print(master.pid, flush=True)
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "error":
    raise ZeroDivisionError
if sys.argv[1] == "os._exit":
    os._exit(4)
if sys.argv[1] == "exec":
    os.execv("/bin/true", ["true"])
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
signal.pause()
"""


@pytest.mark.parametrize("end", ["exit", "error", "os._exit", "exec", "SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_master_ends_with_its_program_in_whatever_way_and_not_with_a_child(tmp_path, end):
    script = tmp_path / "program.py"
    script.write_text(_WITH_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, str(script), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        pid = int(process.stdout.readline())
        process.wait(LIMIT)
        wait_until_ended(pid)  # While the child lives: it still has its standard input.
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_a_child_that_ends_or_drops_the_master_leaves_it_alone():
    with syncbn.Master() as master:
        pid = os.fork()
        if pid == 0:
            master.shutdown()
            master.__del__()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
            assert worker.all_reduce("sum", [2.0])[0] == 2.0


def test_a_master_that_is_not_used_any_more_ends():
    master = syncbn.Master()
    pid = master.pid
    os.kill(pid, 0)
    del master
    wait_until_ended(pid)


def test_a_master_that_has_ended_leaves_no_file_of_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCBN_SHARED_MEMORY_DIR", str(tmp_path))
    monkeypatch.setenv("SYNCBN_SHARED_MEMORY", "same-user")
    with syncbn.Master() as master:
        with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
            assert worker.all_reduce("sum", [2.0])[0] == 2.0
        assert len(list(tmp_path.iterdir())) == 1, "the master's doorbell"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_launchers_signals_to_all_processes_are_for_the_program(number):
    with syncbn.Master() as master:
        os.kill(master.pid, number)
        with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
            assert worker.all_reduce("sum", [2.0])[0] == 2.0


def test_a_master_whose_process_was_killed_is_shut_down_all_the_same():
    master = syncbn.Master()
    os.kill(master.pid, signal.SIGKILL)
    wait_until_ended(master.pid)
    master.shutdown()


def test_a_port_in_use_is_a_typed_error():
    with syncbn.Master() as master:
        with pytest.raises(syncbn.Unavailable, match=master.target) as caught:
            syncbn.Master(master.target)
        assert isinstance(caught.value, ConnectionError)


def test_what_a_master_refuses_arrives_as_it_is(tmp_path):
    with pytest.raises(syncbn.InvalidArgument, match="insecure"):
        syncbn.Master("0.0.0.0:0")
    with pytest.raises(syncbn.InvalidArgument, match="missing.pem"):
        syncbn.Master(cert_file=tmp_path / "missing.pem", key_file=tmp_path / "missing.pem")
    with pytest.raises(TypeError, match="address"):
        syncbn.Master(50051)


def test_a_socket_in_the_working_directory_and_one_that_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with syncbn.Master("unix:here") as master:
        monkeypatch.chdir("/")
        with syncbn.Worker(f"unix:{tmp_path}/here", rank=0, world_size=1) as worker:
            assert worker.all_reduce("sum", [2.0])[0] == 2.0
        assert master.target == "unix:here"


_SMALL = """
import syncbn
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    print(worker.all_reduce("sum", [2.0])[0], flush=True)
"""


def test_a_working_directory_that_is_gone(tmp_path):
    code, output, errors = run(tmp_path, f"import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n{_SMALL}", cwd=tmp_path)
    assert (code, output) == (0, "2.0\n"), errors


def test_paths_relative_to_a_directory_that_the_program_leaves(tmp_path):
    """The check of the package, and that of the library."""
    package = os.path.relpath(pathlib.Path(syncbn.__file__).parents[1], tmp_path)
    library = os.environ.get("SYNCBN_LIBRARY")
    environment = {"PYTHONPATH": os.pathsep.join([package, *sys.path])}
    if library:
        environment["SYNCBN_LIBRARY"] = os.path.relpath(library, tmp_path)
    code, output, errors = run(
        tmp_path, f"import os, syncbn; os.chdir('/')\n{_SMALL}", cwd=tmp_path, environment=environment
    )
    assert (code, output) == (0, "2.0\n"), errors


def test_modules_of_the_programs_that_are_named_as_the_standard_librarys(tmp_path):
    """The master ignores them."""
    folder = tmp_path / "shadows"
    folder.mkdir()
    for name in ("types", "json", "select", "ctypes"):
        (folder / f"{name}.py").write_text("raise RuntimeError('a module of the program')\n")
    source = f"import os, syncbn; os.environ['PYTHONPATH'] = {str(folder)!r}\n{_SMALL}"
    code, output, errors = run(tmp_path, source)
    assert (code, output) == (0, "2.0\n"), errors


@pytest.mark.parametrize("executable", [None, "/nonexistent/python"])
def test_an_interpreter_that_is_packed_or_gone(tmp_path, executable):
    source = f"import sys; sys.frozen = True; sys.executable = {executable!r}\n{_SMALL}"
    code, output, errors = run(tmp_path, source)
    assert (code, output) == (0, "2.0\n"), errors


def test_a_package_in_a_zip_archive(tmp_path):
    """An application that zipapp packs, for example. The library is a file beside it."""
    archive, package = tmp_path / "application.pyz", pathlib.Path(syncbn.__file__).parent
    with zipfile.ZipFile(archive, "w") as zipped:
        for module in package.rglob("*.py"):
            zipped.write(module, module.relative_to(package.parent))
    environment = {"PYTHONPATH": os.pathsep.join([str(archive), *sys.path]), "SYNCBN_LIBRARY": str(_library.PATH)}
    code, output, errors = run(tmp_path, f"import syncbn\nassert '.pyz' in syncbn.__file__\n{_SMALL}", environment=environment)
    assert (code, output) == (0, "2.0\n"), errors


def test_without_any_interpreter_the_error_says_what_to_start(tmp_path):
    source = f"import os, sys; sys.executable = None; os.environ['PATH'] = '/nonexistent'\n{_SMALL}"
    code, _, errors = run(tmp_path, source)
    assert code == 1 and "FailedPrecondition" in errors and "syncbn-master" in errors


def test_a_master_is_not_pickled():
    with syncbn.Master() as master:
        with pytest.raises(TypeError, match="target"):
            pickle.dumps(master)


def test_many_open_files_are_no_hindrance(tmp_path):
    """Descriptors beyond 1,024, which select cannot wait for."""
    source = (
        "import os, resource\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))\n"
        f"files = [os.open('/dev/null', os.O_RDONLY) for _ in range(1100)]\n{_SMALL}"
    )
    code, output, errors = run(tmp_path, source)
    assert (code, output) == (0, "2.0\n") or "ValueError: " in errors, errors


# ---- A parent with an open worker ----


def in_child(function):
    """Calls `function` in a forked child. Returns "none", or the error's class and reason."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            text = "none"
        except BaseException as error:
            text = f"{type(error).__name__} {getattr(error, 'reason', '')}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return text


def test_a_child_of_an_open_worker_is_refused_at_once(master):
    with syncbn.Worker(master.target, "forks", 0, 1) as worker:
        started = worker.start_all_reduce("begun", [1.0])
        calls = {
            "worker": lambda: syncbn.Worker(master.target, "child", 0, 1, join_timeout=600),
            "alone": lambda: syncbn.Worker(),
            "master": lambda: syncbn.Master(),
            "default": syncbn.default_worker,
            "parent's": lambda: worker.all_reduce("sum", [1.0]),
            "parent's round": started.result,
            "declare": lambda: worker.declare_layer("layer", 2),
            "interrupt": worker.interrupt,
            "leave": worker.leave,
        }
        for name, function in calls.items():
            assert in_child(function) == "FailedPrecondition FORKED", name
        assert in_child(worker.close) == "none"
        # A child that comes to the end of the block has nothing to leave.
        assert in_child(lambda: worker.__exit__(None, None, None)) == "none"
        assert started.result()[0] == 1.0
        assert worker.all_reduce("sum", [2.0])[0] == 2.0


def test_a_child_of_a_child_is_refused_too(master):
    with syncbn.Worker(master.target, "generations", 0, 1):
        nested = lambda: in_child(lambda: syncbn.Worker(master.target, "child", 0, 1))

        def check():
            assert nested() == "FailedPrecondition FORKED"

        assert in_child(check) == "none"


_LIVES_ON = """
import os, sys, threading
import syncbn
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    stop = threading.Event()
    def train():  # So that locks are held at the forks.
        while not stop.is_set():
            worker.all_reduce("sum", [1.0])
    thread = threading.Thread(target=train)
    thread.start()
    for _ in range(50):
        pid = os.fork()
        if pid == 0:
            sys.exit(0)  # With the interpreter's whole end: atexit, garbage.
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit(1)
    stop.set()
    thread.join()
    print(worker.all_reduce("last", [2.0])[0])
"""


def test_children_that_end_as_programs_do_while_threads_train(tmp_path):
    # CPython 3.15 warns of every fork beside threads.
    warnings = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    code, output, errors = run(tmp_path, _LIVES_ON, flags=["-X", "dev", *warnings])
    assert (code, output, errors) == (0, "2.0\n", "")


_AFTER_IMPORT = """
import os, syncbn
master = syncbn.Master()
pid = os.fork()  # As a notebook's launcher.
if pid == 0:
    with syncbn.Master() as own, syncbn.Worker(own.target, rank=0, world_size=1) as worker:
        os._exit(0 if worker.all_reduce("sum", [2.0])[0] == 2.0 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_between_import_and_the_first_worker(tmp_path):
    code, output, errors = run(tmp_path, _AFTER_IMPORT)
    assert (code, output) == (0, "0\n"), errors


_LOADER = """
import torch, syncbn, syncbn.torch

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.full((2,), float(index))

with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    model = syncbn.torch.convert_sync_batchnorm(torch.nn.BatchNorm1d(2), worker)
    loader = torch.utils.data.DataLoader(
        Data(), batch_size=4, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    for _ in range(2):
        for x in loader:
            model(x).sum().backward()
    print("trained")
"""


def test_a_data_loader_of_forked_processes_beside_an_open_worker(tmp_path):
    pytest.importorskip("torch")
    code, output, errors = run(tmp_path, _LOADER)
    assert (code, output) == (0, "trained\n"), errors


# One thread: after a fork, torch 2.15's own batch normalization waits for its other threads without end.
_FORWARD = """
import os, torch, syncbn, syncbn.torch
torch.set_num_threads(1)
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    own = syncbn.torch.convert_sync_batchnorm(torch.nn.BatchNorm1d(2), worker)
    any = syncbn.torch.convert_sync_batchnorm(torch.nn.BatchNorm1d(2))
    x = torch.randn(4, 2)
    own(x), any(x)
    pid = os.fork()
    if pid == 0:
        refused = 0
        for model in (own, any):
            model.eval()(x)  # Evaluation needs no worker.
            try:
                model.train()(x)
            except syncbn.Error as error:
                refused += error.reason == "FORKED"
        os._exit(refused)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    own(x), any(x)
"""


def test_layers_in_a_forked_child(tmp_path):
    pytest.importorskip("torch")
    code, output, errors = run(tmp_path, _FORWARD)
    assert (code, output) == (0, "2\n"), errors


_HABITS = {
    "children are not waited for": "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "standard input is closed": "import os; os.close(0)",
    "standard input and output are others": "import os; os.close(0); os.dup2(2, 1); os.open('/dev/null', os.O_RDONLY)",
    "signals are blocked": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
}

_SMALL_TO_STDERR = """
import os, sys, syncbn
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    sys.stderr.write(f"{worker.all_reduce('sum', [2.0])[0]}\\n")
"""


@pytest.mark.parametrize("habit", list(_HABITS))
def test_what_programs_do_to_their_signals_and_descriptors(tmp_path, habit):
    code, _, errors = run(tmp_path, f"{_HABITS[habit]}\n{_SMALL_TO_STDERR}")
    assert (code, errors) == (0, "2.0\n")


_FORKS_MEANWHILE = """
import os, threading, syncbn
def start():
    for _ in range(2):
        syncbn.Master().shutdown()
thread = threading.Thread(target=start)
thread.start()
while thread.is_alive():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
print("done")
"""


def test_forks_while_a_master_starts_on_another_thread(tmp_path):
    code, output, errors = run(tmp_path, _FORKS_MEANWHILE)
    assert (code, output) == (0, "done\n"), errors


# ---- Programs that do several of these things at once ----

_START = processes.SIGNAL_IN_WAIT + """
import ctypes, os, signal, subprocess, sys, threading
import syncbn
master = syncbn.Master()
"""

_TWO = """
a, b = (syncbn.Worker(master.target, rank=rank, world_size=2, timeout=200) for rank in range(2))
"""

_PROGRAMS = {
    "a daemon that trains": """
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    with syncbn.Master() as own, syncbn.Worker(own.target, rank=0, world_size=1) as worker:
        os.write(writer, str(worker.all_reduce("sum", [3.0])[0]).encode())
    os._exit(0)
os.wait()
print(os.read(reader, 100).decode())
""",
    "a fork by C, without Python's hooks": """
with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        try:
            worker.all_reduce("sum", [1.0])
        except syncbn.Error as error:
            os._exit(0 if error.reason == "FORKED" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    print(worker.all_reduce("sum", [3.0])[0])
""",
    "forks while a round is under way": _TWO + """
begun = a.start_all_reduce("sum", [1.0])
begun.wait(0.0)
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
b.all_reduce("sum", [2.0])
print(begun.result()[0])
""",
    "a fork, rounds and a checkpoint in a handler, within a wait": _TWO + """
def handler(*_):
    pid = os.fork()
    if pid == 0:
        sys.exit(0)  # Through the frames of the wait.
    assert os.waitpid(pid, 0)[1] == 0
    assert a.state_dict()["next"]["sum"]["sum"] == 1, a.state_dict()
    other = threading.Thread(target=b.all_reduce, args=("handler's", [1.0]))
    other.start()
    a.all_reduce("handler's", [1.0])
    other.join()
    last.start()
signal.signal(signal.SIGUSR1, handler)
last = threading.Thread(target=b.all_reduce, args=("sum", [2.0]))
threading.Thread(target=signal_in_wait, daemon=True).start()
print(a.all_reduce("sum", [1.0])[0])
""",
    "a handler that reaps every child": """
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
with syncbn.Master() as second, syncbn.Worker(second.target, rank=0, world_size=1) as worker:
    subprocess.run(["true"])
    print(worker.all_reduce("sum", [3.0])[0])
""",
    "interval timers over many rounds": """
for timer, number in ((signal.ITIMER_REAL, signal.SIGALRM), (signal.ITIMER_PROF, signal.SIGPROF)):
    signal.signal(number, lambda *_: None)
    signal.setitimer(timer, 0.001, 0.001)
with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    assert all(worker.all_reduce("sum", [float(i)])[0] == i for i in range(300))
for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
    signal.setitimer(timer, 0)  # At its end the interpreter takes the handlers back.
print(3.0)
""",
    "a program that is executed with all descriptors": """
code = "import sys, syncbn; w = syncbn.Worker(sys.argv[1], 'second', 0, 1); print(w.all_reduce('sum', [3.0])[0]); w.leave()"
with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, master.target])
    assert os.waitpid(pid, 0)[1] == 0 and worker.all_reduce("sum", [1.0])[0] == 1.0
""",
    "functions at the interpreter's end, before and after the import's": """
import atexit
atexit.register(lambda: print(worker.all_reduce("sum", [3.0])[0]))
worker = syncbn.Worker(master.target, rank=0, world_size=1)
""",
}


@pytest.mark.parametrize("program", list(_PROGRAMS))
def test_programs(tmp_path, program):
    code, output, errors = run(tmp_path, _START + _PROGRAMS[program])
    assert (code, output) == (0, "3.0\n"), errors


_KILLED_LOADER = """
import os, signal, threading, time, torch, syncbn, syncbn.torch
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return torch.full((2,), float(index))

with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=2, timeout=200) as worker:
    layer = syncbn.torch.SyncBatchNorm(2, worker=worker)
    batches = iter(torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=1, multiprocessing_context="fork"))
    x = next(batches)
    def kill():
        while not master.workers():
            time.sleep(0.01)  # Nothing tells of a worker's arrival.
        os.kill(batches._workers[0].pid, signal.SIGKILL)
    threading.Thread(target=kill).start()
    try:
        layer(x)
    except RuntimeError as error:
        print("killed" in str(error), int(layer.num_batches_tracked))
    worker.close()
"""


def test_a_data_loaders_process_that_is_killed_while_a_round_is_waited_for(tmp_path):
    """torch raises it in a handler of SIGCHLD, on the main thread."""
    pytest.importorskip("torch")
    code, output, errors = run(tmp_path, _KILLED_LOADER)
    assert (code, output) == (0, "True 0\n"), errors
