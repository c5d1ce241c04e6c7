"""The quickstart: four workers of uneven batches train as one process on the whole batch would.

It starts a master and four worker processes (1, 2, 5 and 8 of each global batch of 16), which train a small network on
1,797 handwritten digits: a convolutional one in PyTorch where that is installed, else one in NumPy. Beside them: one
process on the whole batch, and the same four workers without synchronized batch normalization. Then it compares the
three.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, Iterator, List, Optional

import numpy as np

import syncbn
import task
from output import console, progress, show_table

_HERE = pathlib.Path(__file__).resolve().parent
_SCRIPTS = {"torch": "training.py", "numpy": "training_numpy.py"}
# Seconds, for machines whose cores are taken; the master ends itself a minute later.
_TIME_LIMIT = 600.0
_READY = "syncbn-master ready on "
# The largest difference of the parameters of the synchronized run at its end, in float64.
_TOLERANCE = 1e-9

Records = Dict[str, np.ndarray]


class Failure(Exception):
    """Something that the user has to know, in a line."""


def stop(process: "subprocess.Popen[str]") -> None:
    """Ends a process that this one started, gently first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_master(lifetime: int = int(_TIME_LIMIT) + 60) -> Iterator[str]:
    """Starts a master on a free port of loopback, for `lifetime` seconds at most; gives its target.

    Without $SYNCBN_MASTER (a machine that has the wheel alone), the master is a `syncbn.Master`.
    """
    binary = os.environ.get("SYNCBN_MASTER")
    if not binary:
        with syncbn.Master(address="127.0.0.1:0") as master:
            yield master.target
        return
    process = subprocess.Popen(
        [binary, "--address", "127.0.0.1:0", "--max-lifetime", str(lifetime), "--log-level", "warning"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_READY):
                # Goes on reading, so that the master never blocks on a full pipe.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield line[len(_READY) :].split()[0]
                return
        raise Failure(f"the master ended with code {process.wait()} before it was ready")
    finally:
        stop(process)


class Trainer:
    """A training process, and how many of its steps are done."""

    def __init__(self, script: str, name: str, output: pathlib.Path, options: List[str]) -> None:
        self.name, self.output, self.steps = name, output, 0
        self.process = subprocess.Popen(
            [sys.executable, str(_HERE / script), "--output", str(output), *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.steps += line == "step\n"

    def records(self) -> Records:
        with np.load(self.output) as file:
            return dict(file)


def inspect(target: str, group: str) -> List[Dict[str, str]]:
    """Asks the live master two questions with grpcurl; each with its command and its answer, shortened."""
    binary = os.environ.get("SYNCBN_GRPCURL") or shutil.which("grpcurl")
    if not binary:
        return []
    service = "syncbn.v1.InspectionService"
    layer = json.dumps({"job": "default", "group": group, "layer": "bn1"})
    answers = []
    for request in ([target, f"{service}/ListGroups"], ["-d", layer, target, f"{service}/GetLayer"]):
        command = [binary, "-plaintext", *request]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        shown = " ".join(["grpcurl", "-plaintext", *(f"'{part}'" if " " in part else part for part in request)])
        answers.append({"command": shown, "answer": shorten(answer.stdout or answer.stderr)})
    return answers


def shorten(answer: str) -> str:
    """JSON with at most three elements of each list of numbers."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, list) and len(value) > 3 and not isinstance(value[0], dict):
            return [*value[:3], f"... {len(value)} in all"]
        return [cut(inner) for inner in value] if isinstance(value, list) else value

    try:
        return json.dumps(cut(json.loads(answer)), indent=2)
    except ValueError:
        return answer.strip()


def watch(trainers: List[Trainer], total: int, target: str, group: str) -> List[Dict[str, str]]:
    """Shows progress until all trainers have ended; asks the master on the way, while the workers train."""
    answers: Optional[List[Dict[str, str]]] = None
    started = time.monotonic()
    with progress("training steps", total) as update:
        while any(trainer.process.poll() is None for trainer in trainers):
            done = sum(trainer.steps for trainer in trainers)
            update(done)
            if answers is None and done > total // 3:
                answers = inspect(target, group)
            for trainer in trainers:
                if trainer.process.poll() not in (None, 0):
                    raise Failure(f"{trainer.name} ended with code {trainer.process.returncode}; its message is above")
            if time.monotonic() - started > _TIME_LIMIT:
                raise Failure(f"training took more than {_TIME_LIMIT:.0f} s")
            time.sleep(0.05)
        update(total)
    for trainer in trainers:
        if trainer.process.returncode != 0:
            raise Failure(f"{trainer.name} ended with code {trainer.process.returncode}; its message is above")
    return answers or []


def difference(workers: List[Records], whole: Records, run: str, when: str, quantity: str) -> float:
    """The largest difference of any worker from the global batch, relative to the largest value there."""
    expected = whole[f"{'float32' if run == 'float32' else 'main'}/{when}/{quantity}"]
    values = [records[f"{run}/{when}/{quantity}"] for records in workers]
    if quantity == "outputs":
        values = [np.concatenate(values)]
    return max(float(np.abs(value - expected).max()) for value in values) / float(np.abs(expected).max())


def summarize(workers: List[Records], whole: Records, steps: int) -> Dict[str, Any]:
    quantities = ("outputs", "gradients", "statistics", "parameters")
    latency = np.concatenate([records["main/latency"] for records in workers])
    return {
        "differences": {
            label: {
                when: {quantity: difference(workers, whole, run, when, quantity) for quantity in quantities}
                for when in ("first", "last")
            }
            for label, run in (("synchronized", "main"), ("unsynchronized", "unsynchronized"))
        },
        "float32_first_step": {
            **{quantity: difference(workers, whole, "float32", "first", quantity) for quantity in quantities},
            "bound": float(whole["float32/bound"]),
        },
        "accuracy": {
            "whole": [float(whole["main/accuracy"])],
            "synchronized": [float(records["main/accuracy"]) for records in workers],
            "unsynchronized": [float(records["unsynchronized/accuracy"]) for records in workers],
        },
        "round_latency_ms": {name: float(np.percentile(latency, q)) * 1e3 for name, q in (("p50", 50), ("p99", 99))},
        "losses": {
            "whole": list(whole["main/losses"] / task.GLOBAL_BATCH),
            **{
                label: list(sum(records[f"{run}/losses"] for records in workers) / task.GLOBAL_BATCH)
                for label, run in (("synchronized", "main"), ("unsynchronized", "unsynchronized"))
            },
        },
        "steps": steps,
    }


def show(summary: Dict[str, Any], dtype: str) -> None:
    head = [""]
    for label in ("synchronized", "unsynchronized"):
        head += [f"{label}\nstep 1", f"{label}\nstep {summary['steps']}"]
    rows = []
    for quantity in ("outputs", "gradients", "statistics", "parameters"):
        values = [
            summary["differences"][k][w][quantity]
            for k in ("synchronized", "unsynchronized")
            for w in ("first", "last")
        ]
        rows.append([quantity, *(f"{value:.1e}" for value in values)])
    show_table(f"Relative difference from one process on the whole batch ({dtype})", head, rows)

    rows = []
    for key, name in (
        ("whole", "one process, batch of 16"),
        ("synchronized", "four workers, synchronized"),
        ("unsynchronized", "four workers, unsynchronized"),
    ):
        values = summary["accuracy"][key]
        rows.append([name, f"{np.mean(values):.1%}", f"{min(values):.1%}"])
    show_table("Test accuracy on 360 digits", ["run", "mean", "worst worker"], rows)
    single = summary["float32_first_step"]
    console.print(
        f"In float32, one step differs by {single['outputs']:.1e} (outputs) and {single['gradients']:.1e} (gradients); "
        f"rounding alone may reach {single['bound']:.1e}."
    )
    latency = summary["round_latency_ms"]
    console.print(f"Round latency, four workers: p50 {latency['p50']:.2f} ms, p99 {latency['p99']:.2f} ms.")


def plot(summary: Dict[str, Any], path: pathlib.Path) -> str:
    """Draws the loss curves. Returns a sentence that says where they are, or why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "No loss curves: matplotlib is not installed."
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    styles = {
        "whole": ("one process, whole batch", "-", 3.5),
        "synchronized": ("four workers, synchronized", "--", 1.5),
    }
    styles["unsynchronized"] = ("four workers, unsynchronized", "-", 1.0)
    for key, (label, style, width) in styles.items():
        axes.plot(summary["losses"][key], style, linewidth=width, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, global batch of 16")
    axes.legend()
    figure.tight_layout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        return f"No loss curves: {path} cannot be written ({error.strerror})."
    finally:
        plt.close(figure)
    return f"Loss curves: {path}."


def devices_of(text: str) -> List[str]:
    """One device for each worker, from one for all or a list."""
    devices = text.split(",")
    return devices * len(task.SIZES) if len(devices) == 1 else devices


def run(arguments: argparse.Namespace, target: str) -> Dict[str, Any]:
    # A master that is not ours may still know the group of another run.
    group = f"{task.GROUP}-{os.getpid()}" if arguments.master else task.GROUP
    common = ["--steps", str(arguments.steps), "--dtype", arguments.dtype]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def start(name: str, options: List[str]) -> Trainer:
            output = pathlib.Path(folder) / f"{name.replace(' ', '-')}.npz"
            trainer = Trainer(_SCRIPTS[arguments.front], name, output, [*common, *options])
            stack.callback(stop, trainer.process)
            return trainer

        workers = [
            start(f"worker {rank}", ["--target", target, "--group", group, "--rank", str(rank), "--device", device])
            for rank, device in enumerate(devices_of(arguments.devices))
        ]
        whole = start("reference", [])
        total = (arguments.steps * 2 + 1) * len(workers) + arguments.steps + 1
        answers = watch([*workers, whole], total, target, group)
        summary = summarize([worker.records() for worker in workers], whole.records(), arguments.steps)
    summary["inspection"] = answers
    summary["devices"] = arguments.devices
    return summary


def next_steps() -> str:
    """Names what to read next: pages of the source tree, or, from a wheel, which has none of them, the docstrings."""
    if (_HERE.parents[1] / "python/README.md").is_file():
        return (
            "Next: client/python/README.md (your own model), client/examples/heterogeneous (PyTorch, JAX, NumPy and C++ in "
            "one group), client/examples/resnet18 (step times)."
        )
    return "Next, your own model: help(syncbn.torch), help(syncbn.jax) or help(syncbn.numpy), after importing it in Python."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument(
        "--front",
        choices=list(_SCRIPTS),
        default="torch" if importlib.util.find_spec("torch") else "numpy",
        help="what the workers train with; default: torch where it is installed",
    )
    parser.add_argument(
        "--devices",
        default="cpu",
        help='of the workers: "cuda", or one for each, "cuda:0,cuda:1,cpu,cpu"; the reference runs on the CPU',
    )
    parser.add_argument("--master", metavar="TARGET", help="use a running master")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the numbers to a file as well")
    parser.add_argument("--plot", metavar="FILE", type=pathlib.Path, default=pathlib.Path("build/quickstart.png"))
    arguments = parser.parse_args()
    if len(devices_of(arguments.devices)) != len(task.SIZES):
        parser.error(f"--devices takes one device, or one for each of the {len(task.SIZES)} workers")
    if arguments.front == "numpy" and set(devices_of(arguments.devices)) != {"cpu"}:
        parser.error("--devices: NumPy's workers run on the CPU")
    started = time.monotonic()
    # An end from outside runs the same clean-up as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.nullcontext(arguments.master) if arguments.master else running_master() as target:
            console.print(
                f"Master on {target}; four {arguments.front} workers with {task.SIZES} of each batch of {task.GLOBAL_BATCH}."
            )
            summary = run(arguments, target)
    except Failure as failure:
        console.print(f"[red]quickstart: {failure}[/red]")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        return 130
    show(summary, arguments.dtype)
    for answer in summary["inspection"]:
        console.print(f"\n$ {answer['command']}", style="bold", highlight=False, markup=False, soft_wrap=True)
        console.print(answer["answer"], highlight=False, markup=False)
    if not summary["inspection"]:
        console.print("grpcurl was not found (set SYNCBN_GRPCURL): the live master was not asked.")
    curves = plot(summary, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2))
    console.print(f"\n{curves} Done in {time.monotonic() - started:.0f} s, and everything is stopped.")
    console.print(next_steps())
    difference_at_end = summary["differences"]["synchronized"]["last"]["parameters"]
    if arguments.dtype == "float64" and difference_at_end > _TOLERANCE:
        console.print(f"[red]The parameters differ by {difference_at_end:.1e}, more than {_TOLERANCE:.0e}.[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
