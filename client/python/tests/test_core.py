"""Masters, workers and rounds over NumPy vectors."""

import concurrent.futures
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import processes
import syncbn
import syncbn.numpy

SEED = 20240117


def moments(x):
    return len(x), x.mean(0), ((x - x.mean(0)) ** 2).sum(0)


def test_version_and_build():
    assert re.fullmatch(r"\d+\.\d+\.\d+", syncbn.__version__)
    assert syncbn.build_info()


@pytest.mark.parametrize("sizes", [(5,), (1, 2, 5, 8), (0, 3, 1), (1, 1)])
def test_synchronize_merges_to_the_global_moments(group, sizes):
    rng = np.random.default_rng(SEED)
    data = rng.normal(50.0, 0.5, (sum(sizes), 7))
    parts = np.split(data, np.cumsum(sizes)[:-1])

    def run(worker):
        worker.declare_layer("layer", 7)
        x = parts[worker.rank]
        return worker.synchronize("layer", *moments(x)) if len(x) else worker.synchronize("layer", 0)

    results = group(len(sizes), run)
    for result in results:
        assert result.count == len(data)
        np.testing.assert_allclose(result.mean, data.mean(0), rtol=1e-14)
        np.testing.assert_allclose(result.var, data.var(0), rtol=1e-11)
        np.testing.assert_array_equal(result.mean, results[0].mean)
        np.testing.assert_array_equal(result.var, results[0].var)
        assert result.missing_ranks == ()


def test_all_empty_gives_count_zero(group):
    def run(worker):
        worker.declare_layer("layer", 3)
        return worker.synchronize("layer", 0)

    for result in group(2, run):
        assert result.count == 0
        np.testing.assert_array_equal(result.mean, np.zeros(3))
        np.testing.assert_array_equal(result.var, np.zeros(3))


def test_sequences_count_by_themselves_or_are_given(group):
    def run(worker):
        first = worker.synchronize("layer", 1, [1.0], [0.0])
        second = worker.synchronize("layer", 1, [2.0], [0.0])
        chosen = worker.synchronize("layer", 1, [3.0], [0.0], sequence=17)
        return first.sequence, second.sequence, chosen.sequence, chosen.mean[0]

    assert group(2, run) == [(0, 1, 17, 3.0)] * 2


def test_backward_round_sums(group):
    def run(worker):
        forward = worker.synchronize("layer", 1, [1.0 * worker.rank, 0.0], [0.0, 0.0], backward=True)
        assert forward.backward_required
        return worker.synchronize_backward("layer", forward.sequence, [worker.rank + 1.0, 2.0], [0.5, worker.rank])

    for result in group(3, run):
        np.testing.assert_array_equal(result.sum_dy, [6.0, 6.0])
        np.testing.assert_array_equal(result.sum_dy_xmu, [1.5, 3.0])


def test_all_reduce_keeps_the_shape_and_takes_long_vectors(group):
    def run(worker):
        small = worker.all_reduce("small", np.full((2, 3), worker.rank + 1, dtype=np.float32))
        long = worker.all_reduce("long", np.arange(300_000.0) * (worker.rank + 1))
        return small, long

    for small, long in group(3, run):
        np.testing.assert_array_equal(small, np.full((2, 3), 6.0))
        assert small.dtype == np.float64
        np.testing.assert_array_equal(long, np.arange(300_000.0) * 6)


def test_a_layer_and_a_sum_of_one_name(group):
    """They take turns: each is declared anew where the other has been used."""

    def run(worker):
        found = []
        for _ in range(3):
            merged = worker.synchronize("both", 1, [float(worker.rank)], [0.0], backward=True)
            found += [merged.mean[0], *worker.all_reduce("both", [1.0, 2.0, 3.0])]
            found.append(worker.synchronize_backward("both", merged.sequence, [1.0], [0.5]).sum_dy_xmu[0])
        return found

    assert group(2, run) == [[0.5, 2.0, 4.0, 6.0, 1.0] * 3] * 2


def test_several_rounds_travel_together(group):
    def run(worker):
        rounds = [worker.start_all_reduce(f"vector {i}", [float(i + worker.rank)]) for i in range(5)]
        worker.flush()
        return [float(r.result()[0]) for r in reversed(rounds)]

    assert group(2, run) == [[9.0, 7.0, 5.0, 3.0, 1.0]] * 2


def test_members_are_waited_for(group):
    assert group(3, lambda worker: worker.wait_for_members(20.0)) == [True] * 3


def test_waiting_for_members_that_do_not_come_ends(master):
    with syncbn.Worker(master.target, "alone", 0, 2) as worker:
        assert not worker.wait_for_members(0.05)


def test_defaults_come_from_the_environment(master, monkeypatch):
    for name, value in {
        "SYNCBN_TARGET": master.target,
        "RANK": "2",
        "WORLD_SIZE": "3",
        "TORCHELASTIC_RUN_ID": "job-of-environment",
        "TORCHELASTIC_RESTART_COUNT": "4",
    }.items():
        monkeypatch.setenv(name, value)
    with syncbn.Worker() as worker:
        assert (worker.rank, worker.world_size, worker.job, worker.group) == (2, 3, "job-of-environment", "default")


@pytest.mark.parametrize(
    "arguments", [dict(rank=0), dict(world_size=2), dict(rank=2, world_size=2), dict(rank=0, world_size=1, timeout=0)]
)
def test_bad_arguments_are_refused_before_anything_is_sent(master, monkeypatch, arguments):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError):
        syncbn.Worker(master.target, **arguments)


def test_several_workers_without_a_target_are_told_what_to_set(monkeypatch):
    monkeypatch.delenv("SYNCBN_TARGET", raising=False)
    with pytest.raises(ValueError, match="SYNCBN_TARGET"):
        syncbn.Worker(rank=0, world_size=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(syncbn.FailedPrecondition, match="no worker is open.*SYNCBN_TARGET") as caught:
        syncbn.default_worker()
    assert caught.value.reason == "NO_WORKER"


def test_no_master_is_unavailable(tmp_path):
    with pytest.raises(syncbn.Unavailable) as caught:
        syncbn.Worker(f"unix:{tmp_path}/nobody", rank=0, world_size=1, join_timeout=0.2)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.code is syncbn.Code.UNAVAILABLE


def test_a_missing_worker_is_named_at_the_deadline(master):
    with syncbn.Worker(master.target, "deadline", 0, 2, timeout=0.2) as worker:
        with pytest.raises(syncbn.DeadlineExceeded) as caught:
            worker.synchronize("stem.bn", 1, [1.0], [0.0])
    assert (caught.value.reason, caught.value.layer, caught.value.ranks) == ("ROUND_TIMEOUT", "stem.bn", (1,))
    assert isinstance(caught.value, TimeoutError)


def test_an_exception_in_the_block_tells_the_others_at_once(master):
    ready = threading.Event()
    seen = []

    def survivor():
        with syncbn.Worker(master.target, "loss", 0, 2, timeout=60.0) as worker:
            started = worker.start_synchronize("layer", 1, [1.0], [0.0])
            worker.flush()
            ready.set()
            with pytest.raises(syncbn.WorkerLost) as caught:
                started.result()
            seen.append(caught.value)

    thread = threading.Thread(target=survivor)
    with pytest.raises(ZeroDivisionError):
        with syncbn.Worker(master.target, "loss", 1, 2, timeout=60.0):
            thread.start()
            assert ready.wait(20)
            raise ZeroDivisionError
    thread.join()
    assert seen[0].ranks == (1,) and seen[0].reason == "WORKER_LOST"


def test_a_worker_that_leaves_is_not_waited_for(group):
    def run(worker):
        worker.wait_for_members()
        worker.all_reduce("begin", [0.0])
        if worker.rank == 1:
            return None
        return worker.synchronize("layer", 2, [5.0], [1.0])

    result = group(2, run)[0]
    assert (result.count, result.missing_ranks) == (2, (1,))


def test_layers_that_differ_are_a_mismatch(group):
    def run(worker):
        channels = 2 + worker.rank
        with pytest.raises(syncbn.LayerMismatch) as caught:
            worker.synchronize("layer", 1, np.zeros(channels), np.zeros(channels))
        # Both see the error before either goes: a leave would end the conflict.
        worker.all_reduce("end", [0.0])
        return caught.value.layer

    assert group(2, run) == ["layer", "layer"]


def test_numbers_that_are_not_finite_fail_for_all(group):
    def run(worker):
        worker.wait_for_members()
        with pytest.raises(syncbn.NotFinite) as caught:
            worker.synchronize("layer", 1, [np.nan if worker.rank else 0.0], [0.0])
        worker.all_reduce("end", [0.0])
        return caught.value.ranks

    assert group(2, run) == [(1,), (1,)]


def test_interrupt_ends_a_wait_and_the_worker_goes_on(master):
    with syncbn.Worker(master.target, "interrupt", 0, 2) as worker:
        started = worker.start_synchronize("layer", 1, [1.0], [0.0])
        worker.flush()
        stop = threading.Event()

        def interrupt():
            while not stop.wait(0.01):  # Again until it meets the wait.
                worker.interrupt()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(syncbn.Cancelled):
            started.result()
        stop.set()
        thread.join()
        assert not worker.closed
        assert not worker.wait_for_members(0.01)


def test_round_wait_with_a_timeout(master):
    with syncbn.Worker(master.target, "pending", 0, 2) as worker:
        assert not worker.start_synchronize("layer", 1, [1.0], [0.0]).wait(0.02)


def test_a_closed_worker_refuses(master):
    worker = syncbn.Worker(master.target, "closed", 0, 1)
    worker.leave()
    worker.close()
    with pytest.raises(syncbn.FailedPrecondition) as caught:
        worker.all_reduce("sum", [1.0])
    assert caught.value.reason == "LEFT"


def test_a_forked_child_is_refused(master):
    with syncbn.Worker(master.target, "forked", 0, 1) as worker:
        pid = os.fork()
        if pid == 0:
            try:
                worker.all_reduce("sum", [1.0])
            except syncbn.Error as error:
                os._exit(7 if error.reason == "FORKED" else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert worker.all_reduce("sum", [2.0])[0] == 2.0


def test_default_worker(master):
    with syncbn.Worker(master.target, "one", 0, 1) as one:
        assert syncbn.default_worker() is one
        with syncbn.Worker(master.target, "two", 0, 1) as two:
            assert syncbn.default_worker() is two
            assert pickle.loads(pickle.dumps(one)) is one
    assert pickle.loads(pickle.dumps(one)) is None


def test_the_default_worker_may_be_made_from_the_environment(master, monkeypatch):
    for name, value in {"SYNCBN_TARGET": master.target, "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "default worker")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: syncbn.default_worker(), range(8)))
    worker = syncbn.default_worker()
    assert all(other is worker for other in found)
    assert (worker.rank, worker.world_size, worker.job) == (1, 2, "default worker")
    worker.close()
    monkeypatch.delenv("RANK")
    with pytest.raises(syncbn.FailedPrecondition, match="no worker is open.*RANK"):
        syncbn.default_worker()


def test_errors_survive_pickling():
    error = syncbn.WorkerLost("text", 14, "WORKER_LOST", "layer", (1, 2))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is syncbn.WorkerLost
    assert (copy.message, copy.code, copy.reason, copy.layer, copy.ranks) == (
        "text",
        syncbn.Code.UNAVAILABLE,
        "WORKER_LOST",
        "layer",
        (1, 2),
    )


def test_every_error_of_the_protocol_has_a_class():
    """The table of PROTOCOL.md, section 9, by code and reason. Each error is caught by its base, and can be pickled."""
    page = pathlib.Path(__file__).resolve().parent / "../../../proto/PROTOCOL.md"
    if not page.exists():
        pytest.skip("the wheel is tested away from the tree, and PROTOCOL.md is not in it")
    table = page.read_text().split("## 9. Errors")[1].split("## 10.")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[2:4]] for line in table.splitlines() if line.startswith("| ")][1:]
    listed = [(syncbn.Code[code], "" if reason == "none" else reason) for code, reason in rows if code != "any"]
    assert len(listed) >= 20
    of_code = {}
    for code, reason in listed:
        error = syncbn.errors.make_error("text", code, reason, "layer", [1])
        assert type(error) is not syncbn.Error and getattr(syncbn, type(error).__name__) is type(error), (code, reason)
        assert (error.code, error.reason, error.ranks) == (code, reason, (1,))
        base = of_code.setdefault(code, type(syncbn.errors.make_error("text", code)))
        assert isinstance(error, base), (code, reason)
        assert type(pickle.loads(pickle.dumps(error))) is type(error)
    assert len(set(of_code.values())) == len(of_code)
    assert of_code[syncbn.Code.ALREADY_EXISTS] is syncbn.AlreadyExists


def test_a_rank_that_is_taken_and_a_payload_that_changed_are_typed(master):
    with syncbn.Worker(master.target, "taken", 0, 1, description="the holder") as worker:
        with pytest.raises(syncbn.RankTaken, match="the holder") as caught:
            syncbn.Worker(master.target, "taken", 0, 1, join_timeout=0.5)
        assert (caught.value.code, caught.value.reason, caught.value.ranks) == (6, "RANK_TAKEN", (0,))
        assert "an open worker of this process: end that one first" in caught.value.message
        worker.all_reduce("sum", [1.0], sequence=3)
        with pytest.raises(syncbn.AlreadyExists) as caught:
            worker.all_reduce("sum", [2.0], sequence=3)
        assert (caught.value.code, caught.value.reason) == (6, "PAYLOAD_CHANGED")


def test_a_sweep_over_widths_under_one_name(group):
    """Wider, narrower, then the first width; with rounds of two widths in flight, and backward rounds in reverse."""
    widths = [3, 5, 2, 3, 3, 8, 1]
    rng = np.random.default_rng(SEED)
    data = [rng.normal(2.0, 3.0, (2, 4, width)) for width in widths]

    def run(worker):
        rounds = [worker.start_synchronize("layer", *moments(x[worker.rank]), backward=True) for x in data]
        merged = [one.result() for one in rounds]
        sums = [
            worker.synchronize_backward("layer", sequence, data[sequence][worker.rank].sum(0), np.ones(widths[sequence]))
            for sequence in reversed(range(len(widths)))
        ]
        return merged, sums[::-1]

    for merged, sums in group(2, run):
        for x, forward, backward in zip(data, merged, sums):
            whole = x.reshape(8, -1)
            assert forward.count == 8
            np.testing.assert_allclose(forward.mean, whole.mean(0), rtol=1e-13)
            np.testing.assert_allclose(forward.var, whole.var(0), rtol=1e-12)
            np.testing.assert_allclose(backward.sum_dy, whole.sum(0), rtol=1e-12)
            np.testing.assert_array_equal(backward.sum_dy_xmu, np.full(x.shape[-1], 2.0))


def test_a_width_that_one_worker_alone_changes_is_told(group):
    def run(worker):
        worker.synchronize("layer", 1, [1.0, 2.0], [0.0, 0.0])
        width = 2 + worker.rank
        with pytest.raises(syncbn.LayerMismatch) as caught:
            worker.synchronize("layer", 1, np.ones(width), np.zeros(width))
        # Both see the error before either goes on, with a declaration that they agree on.
        worker.all_reduce("end", [0.0])
        assert worker.synchronize("layer", 1, np.ones(4), np.zeros(4)).count == 2
        return caught.value.layer, "prefix=" in caught.value.message

    assert group(2, run) == [("layer", False), ("layer", True)]


def test_a_new_width_keeps_the_layers_other_options(group):
    def run(worker):
        worker.declare_layer("layer", 2, eps=0.5, eps_mode="clamp", momentum=None, numeric="propagate")
        worker.synchronize("layer", 1, [1.0, 2.0], [0.0, 0.0])
        if worker.rank == 1:  # Declares all of it; rank 0 gives a mean alone.
            worker.declare_layer("layer", 3, eps=0.5, eps_mode="clamp", momentum=None, numeric="propagate")
        return worker.synchronize("layer", 1, [np.nan, 1.0, 3.0], np.zeros(3)).mean

    for mean in group(2, run):
        np.testing.assert_array_equal(mean, [np.nan, 1.0, 3.0])


def test_waiting_for_different_rounds_is_a_deadlock(group):
    def run(worker):
        worker.wait_for_members()
        with pytest.raises(syncbn.Deadlock) as caught:
            worker.all_reduce(f"only at {worker.rank}", [1.0])
        return caught.value.reason, worker.all_reduce("after", [1.0])[0]

    assert group(2, run) == [("DEADLOCK", 2.0)] * 2


def test_proceeding_without_a_missing_worker(master):
    with syncbn.Worker(master.target, "proceed", 0, 2, timeout=0.2, min_workers=1) as worker:
        result = worker.synchronize("layer", 3, [1.0], [0.5])
    assert (result.count, result.missing_ranks) == (3, (1,))


def test_closing_ends_the_waits_of_other_threads(master):
    worker = syncbn.Worker(master.target, "closing", 0, 2, timeout=600.0)
    started, waiting, seen = worker.start_all_reduce("sum", [1.0]), threading.Event(), []

    def wait():
        waiting.set()
        with pytest.raises(syncbn.Error) as caught:
            started.result()
        seen.append(caught.value.code)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(20)
    worker.close()
    thread.join(20)
    assert seen and seen[0] in (syncbn.Code.CANCELLED, syncbn.Code.FAILED_PRECONDITION)


@pytest.mark.parametrize("value", ["no", "false", "0", "", 2, -1, 0.0, None, []])
def test_a_switch_is_true_or_false(master, value):
    """Any text would count as true."""
    with pytest.raises(TypeError, match="insecure is .*True or False"):
        syncbn.Master(address="127.0.0.1:0", insecure=value)
    with pytest.raises(TypeError, match="client_cert_auth is .*True or False"):
        syncbn.Master(address="127.0.0.1:0", client_cert_auth=value)
    if value is not None:
        with pytest.raises(TypeError, match="stream_ordered is .*True or False"):
            syncbn.Worker(master.target, "switches", 0, 1, stream_ordered=value)
    with syncbn.Worker(master.target, "switches", 0, 1, stream_ordered=np.bool_(False)) as worker:
        with pytest.raises(TypeError, match="biased_running_variance is .*True or False"):
            worker.declare_layer("layer", 1, biased_running_variance=value)
        with pytest.raises(TypeError, match="biased_running_variance is .*True or False"):
            syncbn.numpy.forward(worker, "layer", np.ones((2, 1)), biased_running_variance=value)


def test_a_batch_without_its_moments_is_refused_before_it_is_sent(group):
    """The others' round goes on, and completes once the argument is corrected."""

    def run(worker):
        worker.declare_layer("layer", 2)
        if worker.rank == 0:
            with pytest.raises(ValueError, match="count is 3"):
                worker.synchronize("layer", 3)
        return worker.synchronize("layer", 3, [1.0, 2.0], [0.0, 0.0]).count

    assert group(2, run) == [6, 6]


def test_what_a_program_leaves_open_is_closed_at_its_end():
    program = (
        "import syncbn; m = syncbn.Master(); w = syncbn.Worker(m.target, rank=0, world_size=1); w.all_reduce('a', [1])"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_threads_share_a_worker(group):
    """Each thread has a layer of its own; the threads of the workers run in any order."""

    def run(worker):
        def layer(index):
            return [worker.all_reduce(f"layer {index}", [float(step + worker.rank)])[0] for step in range(20)]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(layer, range(4)))

    assert group(2, run) == [[[2.0 * step + 1 for step in range(20)]] * 4] * 2


_BESIDE_OTHERS = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import syncbn
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1) as worker:
    print(worker.all_reduce("sum", [2.0]))
"""


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="what is preloaded comes first")
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_libraries_of_the_same_names_do_not_meet(tmp_path):
    """Loads libraries as TensorFlow does, which exposes its own gRPC, protobuf and Abseil to the whole process."""
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    names = ["grpc_init", "grpc_completion_queue_next"]
    source.write_text("#include <stdlib.h>\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in names))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _BESIDE_OTHERS, library], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "[2.]\n"), done.stderr


_INTERRUPTED = """
import signal, sys, syncbn
signal.signal(signal.SIGINT, signal.default_int_handler)  # Under nohup and the like it is ignored.
with syncbn.Master() as master:
    worker = syncbn.Worker(master.target, rank=0, world_size=2, timeout=600)
    started = worker.start_all_reduce("sum", [1.0])
    worker.flush()
    try:
        print("waiting", flush=True)
        started.result()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    worker.close()
"""


def test_ctrl_c_ends_a_wait_on_the_main_thread():
    process = subprocess.Popen([sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


_INTERRUPTED_ELSEWHERE = """
import ctypes, signal, threading, syncbn
signal.signal(signal.SIGINT, signal.default_int_handler)  # Under nohup and the like it is ignored.
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with syncbn.Master() as master:
    worker = syncbn.Worker(master.target, rank=0, world_size=2, timeout=600)
    seen = []
    def wait():
        try:
            worker.all_reduce("sum", [1.0])
        except BaseException as error:
            seen.append(type(error).__name__)
        libc.pthread_mutex_unlock(mutex)
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        print(hex(ctypes.addressof(mutex)), flush=True)
        libc.pthread_mutex_lock(mutex)  # As autograd's engine or JAX's runtime: no signal ends this.
        print("not interrupted", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    thread.join()
    print(seen, flush=True)
    worker.close()
"""


@pytest.mark.skipif(not os.access("/proc/self/syscall", os.R_OK), reason="/proc does not tell system calls")
def test_ctrl_c_ends_a_wait_on_another_thread():
    process = subprocess.Popen([sys.executable, "-c", _INTERRUPTED_ELSEWHERE], stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        # Wait until its main thread waits for the mutex: a futex call, whose first argument is the address.
        while address not in pathlib.Path(f"/proc/{process.pid}/syscall").read_text().split():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n['KeyboardInterrupt']\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_a_forked_child_does_not_note_its_signals_for_the_parent(master):
    with syncbn.Worker(master.target, "signals", 0, 1):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if signal.set_wakeup_fd(-1) == -1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        listening = signal.set_wakeup_fd(-1)
        assert listening != -1
        signal.set_wakeup_fd(listening)


def test_a_wakeup_descriptor_of_someone_else_is_left_alone(master):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with syncbn.Worker(master.target, "wakeup", 0, 1):
            assert signal.set_wakeup_fd(writer) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def test_a_missing_library_says_what_to_do():
    environment = dict(os.environ, SYNCBN_LIBRARY="/nonexistent/libsyncbn.so")
    process = subprocess.run([sys.executable, "-c", "import syncbn"], env=environment, capture_output=True, text=True)
    assert "ImportError" in process.stderr and "SYNCBN_LIBRARY" in process.stderr


def test_a_master_counts_the_workers_that_are_connected():
    with syncbn.Master() as master:
        assert master.workers() == 0
        with syncbn.Worker(master.target, "a", 0, 2), syncbn.Worker(master.target, "b", 0, 1) as second:
            assert master.workers() == 2
            second.leave()
            processes.wait_until(lambda: master.workers() == 1)
        processes.wait_until(lambda: master.workers() == 0)
    assert master.workers() == 0
