"""python -m syncbn, and the console script of the wheel."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import processes
import syncbn
from syncbn import _doctor


def run(*arguments, **variables):
    environment = {k: v for k, v in processes.environment(**variables).items() if v is not None}
    return subprocess.run(
        [sys.executable, "-m", "syncbn", *arguments], capture_output=True, text=True, timeout=240, env=environment
    )


def test_the_doctor_of_an_installation_that_works(master):
    done = run("doctor", SYNCBN_TARGET=master.target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"syncbn {syncbn.__version__} in " in done.stdout and syncbn.build_info() in done.stdout
    assert re.search(r"^ok    a round with itself: 50 rounds, .* ms at the median", done.stdout, re.M)
    assert re.search(rf"^ok    the master at {re.escape(master.target)}: 50 rounds", done.stdout, re.M)
    assert done.stdout.endswith("All is well.\n") and "FAIL" not in done.stdout


def test_the_doctor_tells_a_host_without_a_driver_from_a_gpu_that_cannot_be_used(monkeypatch, tmp_path):
    def fail(*arguments):
        raise syncbn.FailedPrecondition("CUDA error 35", code=9)

    monkeypatch.setattr(_doctor._library, "call", fail)
    monkeypatch.setattr(syncbn, "build_info", lambda: "cpu=AVX2 cuda=13.0")
    monkeypatch.setattr(_doctor, "_DRIVERS", (str(tmp_path / "absent"),))
    assert _doctor._cuda() == "this host has no NVIDIA driver"
    monkeypatch.setattr(_doctor, "_DRIVERS", (str(tmp_path / "absent"), str(tmp_path)))
    assert _doctor._cuda() == "none that the library uses (CUDA error 35)"
    monkeypatch.setattr(_doctor, "_DRIVERS", ())
    monkeypatch.setattr(syncbn, "build_info", lambda: "cpu=AVX2 cuda=no")
    assert _doctor._cuda() == "none that the library uses (CUDA error 35)"


def test_the_doctor_of_a_target_that_does_not_answer():
    with socket.socket() as taken:  # Bound and not listening.
        taken.bind(("127.0.0.1", 0))
        target = "127.0.0.1:%d" % taken.getsockname()[1]
        done = run("doctor", "--target", target, "--join-timeout", "0.5", SYNCBN_MASTER="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^FAIL  the master at {target}: Unavailable: ", done.stdout, re.M), done.stdout
    assert re.search("^ok    a round with itself", done.stdout, re.M)


def test_the_doctor_without_a_target_does_not_ask_for_one():
    done = run("doctor", SYNCBN_TARGET="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neither --target nor SYNCBN_TARGET" in done.stdout


@pytest.mark.skipif(
    not os.path.exists(os.environ.get("SYNCBN_MASTER", "")), reason="SYNCBN_MASTER does not name the master's binary"
)
def test_the_masters_program_is_the_one_that_is_named():
    done = run("master", "--version")
    assert done.returncode == 0 and done.stdout.startswith(f"syncbn-master {syncbn.__version__} (")
    refused = run("master", "--max-workers", "none")
    assert refused.returncode == 2 and "max-workers" in refused.stderr


def test_a_named_program_that_is_absent(tmp_path):
    done = run("master", SYNCBN_MASTER=str(tmp_path / "absent"))
    assert done.returncode == 2 and "there is no such program" in done.stderr


def test_a_master_as_a_program():
    command = [sys.executable, "-m", "syncbn", "master", "--exit-timeout", "0.1"]
    environment = processes.environment(SYNCBN_MASTER="", SYNCBN_ADDRESS="127.0.0.1:0")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        target = process.stdout.readline().split("syncbn-master ready on ")[1].strip()
        with syncbn.Worker(target, "program", 0, 1, timeout=60.0) as worker:
            assert worker.synchronize("layer", 2, [1.0], [2.0]).var[0] == 1.0
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


def test_flags_with_which_no_master_can_serve():
    for arguments, words in (
        (["--address", "0.0.0.0:0"], "insecure"),
        (["--exit-timeout", "-1"], "exit-timeout"),
        (["--max-workers", "3"], "max-workers"),
    ):
        done = run("master", *arguments, SYNCBN_MASTER="")
        assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.fixture
def program():
    """Starts syncbn-master as a program. Returns the process and its target."""
    started = []

    def start(*arguments, **variables):
        environment = processes.environment(SYNCBN_MASTER="", **variables)
        environment.pop("PYTHONUNBUFFERED", None)  # With it, Python keeps nothing that it could not write.
        command = [sys.executable, "-m", "syncbn", "master", "--address", "127.0.0.1:0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process, process.stdout.readline().split("syncbn-master ready on ")[1].strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("value", ["True", "TRUE", "yes", "On", "1"])
def test_a_switch_in_the_environment_is_heeded_however_it_is_written(value):
    """A master that took "True" for no would serve workers without a certificate."""
    done = run("master", "--max-lifetime", "0.01", SYNCBN_MASTER="", SYNCBN_CLIENT_CERT_AUTH=value)
    assert done.returncode == 2 and "trusted CA" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--client-cert-auth=true"], 2, "trusted CA"),
        (["--client-cert-auth=YES"], 2, "trusted CA"),
        (["--client-cert-auth"], 2, "trusted CA"),
        (["--client-cert-auth=false"], 0, ""),
        (["--client-cert-auth=Off", "--insecure=0"], 0, ""),
        (["--client-cert-auth=maybe"], 2, 'argument --client-cert-auth: "maybe" is not true or false'),
        (["--insecure="], 2, 'argument --insecure: "" is not true or false'),
        (["--insecure", "--insecure=true"], 2, "argument --insecure: is given twice"),
    ],
)
def test_a_switch_takes_a_value_as_the_compiled_programs(arguments, code, words):
    """The variable says the opposite: a flag goes before it."""
    default = "1" if code == 0 else "0"
    variables = {"SYNCBN_MASTER": "", "SYNCBN_CLIENT_CERT_AUTH": default}
    done = run("master", "--address", "127.0.0.1:0", "--max-lifetime", "0.01", *arguments, **variables)
    assert done.returncode == code and words in done.stderr, done.stderr


@pytest.mark.parametrize(
    "variables, words",
    [
        (
            {"SYNCBN_CLIENT_CERT_AUTH": "maybe"},
            "SYNCBN_CLIENT_CERT_AUTH is 'maybe' in the environment; it is 1 or 0, true or false, on or off, yes or no",
        ),
        ({"SYNCBN_TOKEN_FILE": "/a/token"}, "SYNCBN_TOKEN_FILE is set, and this program has no such flag"),
        ({"SYNCBN_STATE_DIR": "/a/folder"}, "SYNCBN_STATE_DIR is set"),
        ({"SYNCBN_EXIT_TIMEOUT": "soon"}, "--exit-timeout"),
        ({"SYNCBN_CONFIG_FILE": "/dev/zero"}, "SYNCBN_CONFIG_FILE is set, and this program has no such flag"),
        ({"SYNCBN_CERT_FILE": "/dev/zero", "SYNCBN_KEY_FILE": "key.pem"}, "longer than 4194304 bytes"),
    ],
)
def test_a_variable_that_cannot_be_heeded_is_refused(variables, words):
    done = run("master", "--address", "127.0.0.1:0", "--max-lifetime", "0.01", SYNCBN_MASTER="", **variables)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_flags_are_written_out_and_given_once():
    for arguments, words in (
        (["--cert", "a.pem"], "unrecognized arguments: --cert"),
        (["--address", "127.0.0.1:0", "--address", "unix:a.sock"], "--address: is given twice"),
        (["--config-file", "/dev/zero"], "--config-file: this program has no such flag: the compiled syncbn-master has it"),
        (["--max-workers=3", "more"], "--max-workers=3: this program has no such flag"),
        (["--cert-file", "/dev/zero", "--key-file", "key.pem"], "longer than 4194304 bytes, the most that are read"),
    ):
        done = run("master", *arguments, SYNCBN_MASTER="")
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_an_address_in_use_ends_the_program_with_1(master):
    done = run("master", "--address", master.target, SYNCBN_MASTER="")
    assert done.returncode == 1 and "address already in use" in done.stderr, done.stderr


def check_that_it_serves_and_ends(process, target):
    with syncbn.Worker(target, "program", 0, 1, timeout=60.0) as worker:
        worker.all_reduce("sum", [1.0])
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def test_signals_of_the_compiled_program_end_nothing(program):
    process, target = program("--exit-timeout", "0.1")
    for number in (signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
        assert number.name in process.stderr.readline()
    check_that_it_serves_and_ends(process, target)


def test_a_flood_of_signals_ends_nothing(program):
    """Nobody reads the program's stderr, and the signals come in the middle of each other's answers."""
    process, target = program("--exit-timeout", "0.1")
    for _ in range(20000):
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
    check_that_it_serves_and_ends(process, target)


def test_a_signal_without_anybody_on_stderr_ends_nothing(program):
    """As when a terminal goes, which sends SIGHUP."""
    process, target = program("--exit-timeout", "0.1")
    process.stderr.close()
    for number in (signal.SIGHUP, signal.SIGUSR1):
        before = sleeps(process.pid)
        process.send_signal(number)
        processes.wait_until(lambda: sleeps(process.pid) > before)
    check_that_it_serves_and_ends(process, target)


def sleeps(pid):
    """How often the process has gone to sleep: once more when it has answered a signal."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)[1])


# Begins the program, and sends it SIGTERM before the line of that number that it runs once it serves, also within the
# modules that it uses.
ENDED_AT_A_LINE = """
import os, signal, sys, syncbn
from syncbn import _program

left = int(sys.argv.pop(1))

def trace(frame, event, argument):
    global left
    if event == "line" and left > 0:
        left -= 1
        if left == 0:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)
    return trace

class Answers:
    def write(self, text):
        if "ready" in text:
            sys.settrace(trace)
            sys._getframe(1).f_trace = trace
        return len(text)

    def flush(self):
        pass

sys.stdout = Answers()
sys.exit(_program.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("lines", range(1, 41))
def test_a_signal_at_any_line_ends_the_program(lines):
    command = [sys.executable, "-c", ENDED_AT_A_LINE, str(lines), "--address", "127.0.0.1:0", "--exit-timeout", "0.1"]
    done = subprocess.run(command, env=processes.environment(SYNCBN_MASTER=""), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_program_ends_with_the_process_that_serves(program):
    """Its supervisor can start it again; before, it went on without serving anybody."""
    process, target = program()
    (child,) = _serving(process.pid)
    os.kill(child, signal.SIGKILL)
    assert process.wait(120) == 1
    assert f"the process that serves, {child}, has ended" in process.stderr.read()


def _serving(owner):
    """The processes that serve for a program: they have its number among their settings."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(f'"owner": {{"pid": {owner},'.encode() in argument for argument in arguments):
            found.append(int(folder.name))
    return found


def test_a_command_that_is_none():
    done = run("operate")
    assert done.returncode == 2 and "doctor" in done.stderr


@pytest.fixture
def setup(tmp_path):
    """Runs a copy of setup.py, as it stands in a clone."""
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    original = pathlib.Path(syncbn.__file__).parents[1]
    if not (original / "setup.py").is_file():
        pytest.skip("this is an installed package")
    folder = tmp_path / "client" / "python"
    (folder / "syncbn").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(original / name, folder)

    def run_setup(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != "SYNCBN_LIBRARY"}
        command = [sys.executable, "setup.py", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)

    return run_setup


def test_a_source_install_has_the_version_of_the_tree(setup, tmp_path):
    (tmp_path / "VERSION").write_text("7.8.9\n")
    done = setup("--version")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "7.8.9", done.stdout + done.stderr


def test_a_source_install_says_what_it_lacks(setup, tmp_path):
    done = setup("--version")
    assert done.returncode != 0 and "there is no file VERSION" in done.stderr
    (tmp_path / "VERSION").write_text("7.8.9\n")
    done = setup("bdist_wheel")
    assert done.returncode != 0 and "tools/build_wheel makes a whole wheel" in done.stderr
