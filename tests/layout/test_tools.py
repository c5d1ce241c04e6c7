"""Properties of the scripts in tools/ and of .bazelrc that concern this tree and this machine."""

import os
import pathlib
import re
import stat
import subprocess
import time
from typing import Dict, List

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Programs that can fetch something. Stand-ins for them come first on the path, and note that they were called.
FETCHERS = ["apt-get", "curl", "go", "pip", "pip3", "sudo", "wget"]


def stand_ins(folder: pathlib.Path, calls: pathlib.Path) -> None:
    """Stand-ins that note their names and fail, also for Python, which installs with -m pip."""
    folder.mkdir()
    for name in [*FETCHERS, "python3"]:
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>"{calls}"\nexit 1\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("script", ["install_deps", "install_cuda"])
def test_a_check_installs_nothing(tmp_path: pathlib.Path, script: str) -> None:
    folder, calls, deps = tmp_path / "bin", tmp_path / "calls", tmp_path / "deps"
    stand_ins(folder, calls)
    environment = dict(os.environ, SYNCBN_DEPS=str(deps), PATH=f"{folder}:/usr/bin:/bin", HOME=str(tmp_path / "home"))
    environment["SYNCBN_PYTHON"] = str(folder / "python3")
    # A compiler that the machine has already would be enough.
    for name in ("CUDA_HOME", "CUDA_PATH", "SYNCBN_CUDA"):
        environment.pop(name, None)
    done = subprocess.run(
        [ROOT / "tools" / script, "--check"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert not calls.exists(), calls.read_text()
    assert not deps.exists()
    if script == "install_deps" or not pathlib.Path("/usr/local/cuda/bin/nvcc").exists():
        assert done.returncode == 1, done.stdout + done.stderr
    if script == "install_deps":
        assert "google.rpc's protos" in done.stderr


def test_a_word_that_install_cuda_does_not_know_installs_nothing(tmp_path: pathlib.Path) -> None:
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    stand_ins(folder, calls)
    environment = dict(os.environ, SYNCBN_DEPS=str(tmp_path / "deps"), PATH=f"{folder}:/usr/bin:/bin")
    done = subprocess.run(
        [ROOT / "tools/install_cuda", "--chek"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "usage" in done.stderr
    assert not calls.exists()


def configurations() -> Dict[str, List[str]]:
    """The build options of each configuration in .bazelrc."""
    found: Dict[str, List[str]] = {}
    for name, options in re.findall(r"^build:(\w+) (.*)$", (ROOT / ".bazelrc").read_text(), re.MULTILINE):
        found.setdefault(name, []).extend(options.split())
    return found


def test_configurations_that_compile_otherwise_have_folders_of_their_own() -> None:
    """Otherwise each overwrites the others' build, and tools/python loads the last one."""
    suffixes = []
    for name, options in configurations().items():
        if not any(option.startswith(("--copt", "--cxxopt", "--linkopt")) for option in options):
            continue
        suffixes.append([option for option in options if option.startswith("--platform_suffix=")])
        assert len(suffixes[-1]) == 1, name
        assert "--experimental_convenience_symlinks=ignore" in options, name
    assert len({suffix for (suffix,) in suffixes}) == len(suffixes) >= 2


def starlark_list(name: str) -> List[str]:
    """A list of third_party/cuda/defs.bzl, read as Bazel reads it: up to its rules, the file is Python too."""
    found: Dict[str, List[str]] = {}
    text = (ROOT / "third_party/cuda/defs.bzl").read_text()
    exec(text[text.index("ARCHITECTURES =") : text.index("def _cc_headers_impl")], found)
    return found[name]


@pytest.mark.parametrize("name", ["CODE_FLAGS", "HOST_COMPILER_FLAGS"])
def test_gpu_check_compiles_with_the_flags_of_the_build(name: str) -> None:
    [function] = re.findall(r"^bazel_list\(\) \{.*?^\}$", (ROOT / "tools/gpu_check").read_text(), re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", f"{function}\nbazel_list {name}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == starlark_list(name) != []
    assert set(starlark_list(name)) < set(starlark_list("NVCC_FLAGS"))


def test_a_fingerprint_changes_with_whatever_a_test_may_depend_on(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/lib.sh").write_text((ROOT / "tools/lib.sh").read_text())
    (tmp_path / ".gitignore").write_text("/ignored\n/user.bazelrc\n")
    source = tmp_path / "a file of code"
    source.write_text("one")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_")}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=60)

    def fingerprint(**variables: str) -> str:
        command = 'source tools/lib.sh; fingerprint "$PYTHON"'
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env={**environment, **variables}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.strip()

    git("init", "--quiet")
    assert fingerprint() == ""  # There is no commit yet: what has been tested could not be told from another tree.
    git("add", "-A")
    git("commit", "--quiet", "--message", "one")
    first = fingerprint()
    assert len(first) == 64 and fingerprint() == first
    (tmp_path / "ignored").write_text("a build's output")
    assert fingerprint() == first

    seen = [first]
    for change in (
        lambda: source.write_text("two"),
        lambda: source.chmod(0o755),
        lambda: (tmp_path / "new").write_text(""),
        lambda: source.unlink(),
        lambda: (tmp_path / "user.bazelrc").write_text("build --copt=-O0"),
        lambda: git("commit", "--all", "--quiet", "--message", "two"),
    ):
        change()
        seen.append(fingerprint())
    seen.append(fingerprint(SYNCBN_SHARED_MEMORY="off"))
    assert len(set(seen)) == len(seen)


def script(path: pathlib.Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def test_an_environment_is_made_once_by_whoever_comes_first(tmp_path: pathlib.Path) -> None:
    """Two that start while it is absent would remove each other's."""
    made, waiting, gate = tmp_path / "made", tmp_path / "waiting", tmp_path / "gate"
    folder = tmp_path / "bin"
    folder.mkdir()
    os.mkfifo(gate)
    # An interpreter whose environment is complete once something stands in the pipe.
    install = f'mkdir -p "$3/bin" && ln -s /bin/true "$3/bin/python" && echo "$3" >>"{made}" && read line <"{gate}"\n'
    script(folder / "python3", install)
    script(folder / "flock", f'echo >>"{waiting}"\nexec /usr/bin/flock "$@"\n')
    environment = dict(os.environ, SYNCBN_DEPS=str(tmp_path / "deps"), SYNCBN_PYTHON=str(folder / "python3"))
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    lines = lambda path: len(path.read_text().splitlines()) if path.exists() else 0  # noqa: E731

    def start() -> "subprocess.Popen[str]":
        command = ["bash", "-c", "source tools/lib.sh; make_venv some package==1"]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def until(*paths: pathlib.Path, count: int) -> None:
        while all(lines(path) < count for path in paths) and all(process.poll() is None for process in processes):
            time.sleep(0.01)  # Nothing tells of a line in a file that a shell writes.

    processes = [start()]
    try:
        until(made, count=1)
        processes.append(start())
        until(made, waiting, count=2)
        gate.write_text("\n")
        ended = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    assert lines(made) == 1, made.read_text()
