"""The console script `syncbn-master` of an installed package: a `syncbn.Master` as a program.

It has the flags of addresses and TLS. Those of the log, metrics and limits are the compiled program's, which it becomes
where SYNCBN_MASTER names one.
"""

import argparse
import contextlib
import math
import os
import pathlib
import select
import signal
import sys
import time
from typing import Any, FrozenSet, List, Optional

import syncbn
from syncbn import _arguments, _environment, _master_process, _variables

# Variables that the library reads by itself, or syncbn.Master.
_READ_ELSEWHERE = {"SYNCBN_TOKEN", "SYNCBN_INSPECTION_TOKEN", "SYNCBN_SHARED_MEMORY", "SYNCBN_SHARED_MEMORY_DIR"}
_LOOK_SECONDS = 0.5


def compiled() -> Optional[pathlib.Path]:
    """The program that SYNCBN_MASTER names, if it does."""
    named = os.environ.get("SYNCBN_MASTER")
    return pathlib.Path(named) if named else None


def _variable_of(flag: str) -> str:
    return "SYNCBN_" + flag.strip("-").replace("-", "_").upper()


class _Once(argparse.Action):
    """A flag that is given twice would otherwise lose its first value without a word."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            parser.error(f"argument {option}: is given twice; this program takes it once")
        given.add(self.dest)
        setattr(namespace, self.dest, value)


def _truth(text: str) -> bool:
    found = _environment.truth(text)
    if found is None:
        raise argparse.ArgumentTypeError(f'"{text}" is not true or false')
    return found


class _Parser:
    """The flags, each with its variable."""

    def __init__(self) -> None:
        self._parser = argparse.ArgumentParser(
            prog="syncbn-master", description="Merges the batch statistics of training workers.", allow_abbrev=False
        )
        self._known = set(_READ_ELSEWHERE)
        self._text("--address", "127.0.0.1:50051", "HOST:PORT (port 0: any free one) or unix:PATH; default: %(default)s")
        self._switch("--insecure", "listen beyond loopback without TLS")
        self._text("--cert-file", None, "PEM certificate; with it and its key, the master accepts TLS only")
        self._text("--key-file", None, "PEM key of the certificate")
        self._text("--trusted-ca-file", None, "PEM certificates of the CA that signs the workers'; needs --client-cert-auth")
        self._switch("--client-cert-auth", "refuse workers without a trusted certificate")
        self._text("--http-address", None, "where to serve the status page, metrics and probes: HOST:PORT, or off; default: off")
        self._seconds("--exit-timeout", 5.0, "seconds that workers have to drain after a signal; default: %(default)s")
        self._seconds("--max-lifetime", 0.0, "exit after this many seconds; 0: never")
        self._parser.add_argument("--version", action="version", version=f"syncbn-master {syncbn.__version__}")

    def parse(self, arguments: List[str]) -> argparse.Namespace:
        """Ends the program, with 2, for what is no flag, and for variables of flags that this program lacks."""
        given, unknown = self._parser.parse_known_args(arguments)
        for word in unknown:
            if _variable_of(word.partition("=")[0]) in _variables.OF_MASTERS:
                self._parser.error(f"{word}: this program has no such flag: the compiled syncbn-master has it")
        if unknown:
            self._parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        _variables.warn_of_misspelled()
        for name in sorted(_variables.OF_MASTERS - self._known):
            if os.environ.get(name):
                self._parser.error(f"{name} is set, and this program has no such flag: the compiled syncbn-master has it")
        return given

    def _variable(self, flag: str) -> Optional[str]:
        name = _variable_of(flag)
        self._known.add(name)
        return os.environ.get(name) or None

    def _text(self, flag: str, default: Optional[str], told: str) -> None:
        self._parser.add_argument(flag, action=_Once, default=self._variable(flag) or default, help=told)

    def _seconds(self, flag: str, default: float, told: str) -> None:
        self._parser.add_argument(flag, action=_Once, type=float, default=self._variable(flag) or default, help=told)

    def _switch(self, flag: str, told: str) -> None:
        name = _variable_of(flag)
        self._known.add(name)
        try:
            default = _environment.flag(name)
        except syncbn.InvalidArgument as error:
            self._parser.error(f"argument {flag}: {error.message}")
        self._parser.add_argument(
            flag, action=_Once, nargs="?", const=True, default=default, type=_truth, metavar="true|false", help=told
        )


_ENDING = frozenset((signal.SIGINT, signal.SIGTERM))
# The compiled program's, which would otherwise end this one.
_NOTED = frozenset((signal.SIGHUP, signal.SIGUSR1))


class _Signals:
    """Signals to this program, from now on.

    Python writes their numbers to a pipe. A handler does nothing: it runs in the middle of whatever the main thread does,
    such as that of writing a line, or of taking a lock that the handler would wait for.
    """

    def __init__(self) -> None:
        self._pipe, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._arrivals = select.poll()
        self._arrivals.register(self._pipe, select.POLLIN)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in _ENDING | _NOTED:
            signal.signal(number, lambda *_: None)

    def wait(self, seconds: float) -> FrozenSet[int]:
        """Returns the numbers of those that have come, at once if there are any."""
        if not self._arrivals.poll(math.ceil(seconds * 1e3)):
            return frozenset()
        return frozenset(os.read(self._pipe, 1 << 16))


def run(arguments: List[str]) -> int:
    """Serves until SIGINT or SIGTERM. Returns: the codes of docs/operations.md: 1 too if the process that serves has ended."""
    program = compiled()
    if program is not None:
        if not program.is_file():
            print(f"syncbn-master: SYNCBN_MASTER is {program}, and there is no such program", file=sys.stderr)
            return 2
        os.execv(program, ["syncbn-master", *arguments])
    given = _Parser().parse(arguments)
    signals = _Signals()
    try:
        grace = _arguments.seconds("--exit-timeout", given.exit_timeout)
        lifetime = _arguments.seconds("--max-lifetime", given.max_lifetime)
        master = syncbn.Master(
            given.address,
            insecure=given.insecure,
            cert_file=given.cert_file,
            key_file=given.key_file,
            trusted_ca_file=given.trusted_ca_file,
            client_cert_auth=given.client_cert_auth,
            http_address=given.http_address or "off",
        )
    except (syncbn.Error, ValueError) as error:
        print(f"syncbn-master: {error}", file=sys.stderr)
        return 1 if isinstance(error, syncbn.Unavailable) else 2
    if master.http_address is not None:
        print(f"status page, metrics and probes on http://{master.http_address}/", file=sys.stderr)
    print(f"syncbn-master ready on {master.target}", flush=True)
    code = _serve(master, signals, lifetime)
    master.shutdown(grace)
    return code


def _tell(what: str) -> None:
    """Says it on stderr, if that is still there: the SIGHUP of a terminal that has gone must not end a master. Without
    Python's buffer, which would keep what cannot be written, and make an exit code of that.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"syncbn-master: {what}\n".encode())


def _serve(master: syncbn.Master, signals: _Signals, lifetime: float) -> int:
    """Waits for a signal, the end of the lifetime (0: there is none), or that of the process that serves."""
    deadline = time.monotonic() + lifetime if lifetime > 0 else math.inf
    noted: FrozenSet[int] = frozenset()
    while time.monotonic() < deadline:
        came = signals.wait(max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic())))
        if came & _ENDING:
            break
        # Each of them once, so that nobody's signals fill a pipe that nobody reads.
        for number in sorted((came & _NOTED) - noted):
            _tell(f"{signal.Signals(number).name} does nothing here; it is for the compiled program")
        noted |= came
        if _master_process.start_time(master.pid or 0) is None:
            _tell(f"the process that serves, {master.pid}, has ended")
            return 1
    return 0


def main() -> int:
    return run(sys.argv[1:])
