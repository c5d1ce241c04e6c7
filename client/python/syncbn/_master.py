"""A master that belongs to this process, in a process of its own."""

import contextlib
import json
import logging
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zipimport
from typing import Any, Dict, List, Optional

from syncbn import _arguments, _forks, _library, _master_process, errors

# Resolved now, since the program may change its working directory.
_SCRIPT = pathlib.Path(_master_process.__file__ or "").resolve()
_START_LIMIT = 120.0
# For what follows upon the grace of a shutdown.
_END_LIMIT = 30.0
_MOST_GRACE = 86400.0
_logger = logging.getLogger("syncbn")


def _interpreter() -> str:
    """Any Python will do; the program's own, unless it is packed into an executable."""
    own = None if getattr(sys, "frozen", False) else sys.executable
    found = own or shutil.which("python3")
    if not found or not (_SCRIPT.is_file() or _is_zipped()):
        raise errors.make_error(
            "syncbn.Master needs a Python interpreter to start its process with, and finds none: start syncbn-master",
            errors.Code.FAILED_PRECONDITION,
        )
    return found


def _is_zipped() -> bool:
    loader: Any = getattr(_master_process.__spec__, "loader", None)
    return isinstance(loader, zipimport.zipimporter)


def _program() -> List[str]:
    """The process's program, as an interpreter's arguments: a file, or a module of the zip archive that has the package."""
    if not _is_zipped():
        return [str(_SCRIPT)]
    # The folder leaves the path again, since modules of the package have names that others have.
    folder = str(_SCRIPT.parent)
    return ["-c", f"import sys; sys.path.insert(0, {folder!r}); import _master_process; del sys.path[0]; _master_process.main()"]


def _owner() -> Dict[str, Any]:
    """This process, as the other one knows it: where that can be, by a descriptor that tells its end."""
    pid = os.getpid()
    try:
        descriptor: Optional[int] = os.pidfd_open(pid)
    except (AttributeError, OSError):
        descriptor = None
    return {"pid": pid, "start_time": _master_process.start_time(pid), "descriptor": descriptor}


class _Process:
    """The master's process, and the two pipes to it."""

    def __init__(self, settings: Dict[str, Any], secrets: Dict[str, str]) -> None:
        """`secrets` are variables for the process, since other users may see its arguments, but not its environment."""
        self._control = self._reports = -1
        self._unread = b""
        self.pid: Optional[int] = None
        try:
            launcher = self._launch(settings, secrets)
            found = self._read(time.monotonic() + _START_LIMIT)
            code = launcher.wait()  # It has left the master to itself.
            if found is None:
                raise errors.make_error(
                    f"the master's process ended before it could serve (exit code {code})", errors.Code.INTERNAL
                )
            if "error" in found:
                raise errors.make_error(**found["error"])
        except BaseException:
            self.forget()  # Ends it, if it is there.
            raise
        self.pid, self.target = int(found["pid"]), str(found["target"])
        self.http_address: Optional[str] = found["http_address"]
        self.http_failure: Optional[str] = found["http_failure"]

    def _launch(self, settings: Dict[str, Any], secrets: Dict[str, str]) -> "subprocess.Popen[bytes]":
        owner = _owner()
        passed = [] if owner["descriptor"] is None else [owner["descriptor"]]
        # Isolated from the program's packages and settings; where the interpreter itself needs PYTHONHOME, as far as that.
        isolation = ["-s", "-S"] if os.environ.get("PYTHONHOME") else ["-I", "-S"]
        argument = json.dumps({"owner": owner, **settings})
        control, self._control = os.pipe()
        self._reports, reports = os.pipe()
        try:
            return subprocess.Popen(
                [_interpreter(), *isolation, *_program(), argument],
                stdin=control,
                stdout=reports,
                pass_fds=passed,
                start_new_session=True,
                env={**os.environ, "SYNCBN_LIBRARY": str(_library.PATH), **secrets},
            )
        finally:
            for descriptor in [control, reports, *passed]:
                os.close(descriptor)

    def _read(self, deadline: float) -> Optional[Dict[str, Any]]:
        """The next report; None if the process has ended, or the time is over."""
        while b"\n" not in self._unread:
            poll = select.poll()
            poll.register(self._reports, select.POLLIN)
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            data = os.read(self._reports, 65536) if ready else b""
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        report: Dict[str, Any] = json.loads(line)
        return report

    def workers(self) -> Optional[int]:
        """The number of workers' streams that are open; None if the process has ended, or does not answer."""
        try:
            os.write(self._control, _master_process.ASK_WORKERS)
        except BrokenPipeError:
            return None
        answer = self._read(time.monotonic() + _END_LIMIT)
        return None if answer is None else int(answer["workers"])

    def end(self, grace: float) -> None:
        """Has it end, within `grace` seconds for its streams; kills it if it does not."""
        ended = None
        try:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._control, repr(grace).encode())
            deadline = time.monotonic() + grace + _END_LIMIT
            ended = self._read(deadline)
            while ended is not None and "ended" not in ended:  # The answer to a question whose asker was interrupted.
                ended = self._read(deadline)
        finally:
            self.forget()
            if ended is None and self.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            if self.pid is not None:
                with contextlib.suppress(ChildProcessError):  # Ours it is only where we adopt orphans, as process 1.
                    os.waitpid(self.pid, 0)

    def forget(self) -> None:
        """Closes the pipes: as far as they are this process's alone, that ends the master."""
        for descriptor in (self._control, self._reports):
            if descriptor >= 0:
                os.close(descriptor)
        self._control = self._reports = -1


def make_certificate(host: str, cert_file: str, key_file: str) -> None:
    """Writes a new key and a certificate of its own for `host`. Errors: as syncbn_make_certificate in syncbn.h."""
    text = _library.text
    _library.call(_library.lib.syncbn_make_certificate, text(host), text(cert_file), text(key_file))


def _key_pair(address: str, folder: str) -> Dict[str, str]:
    """The options `cert_file` and `key_file`, of a new key pair for the host of the address."""
    host = "localhost" if address.startswith("unix") else address.rpartition(":")[0].strip("[]")
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host
    files = {name: os.path.join(folder, f"{name}.pem") for name in ("cert_file", "key_file")}
    make_certificate(host, files["cert_file"], files["key_file"])
    return files


def _http_settings(given: Optional[str]) -> Optional[Dict[str, Any]]:
    """The address on which HTTP is served, and whether it is an error if that is taken; None: nowhere."""
    address = (os.environ.get("SYNCBN_HTTP_ADDRESS") or "off") if given is None else given
    address = _arguments.text("http_address", address, 4096)
    return None if address == "off" else {"address": address, "required": given is not None}


class Master:
    """A master that belongs to this process, and runs in a process of its own.

    So this process may fork: its children may have workers, and neither keep the master alive nor end it. It ends with
    `shutdown`, when this object is no longer used, and when this process ends, whatever the way.

    Args:
      address: "HOST:PORT" (port 0: any free one) or "unix:PATH".
      insecure: listen beyond loopback without TLS.
      cert_file, key_file: this server's certificate: TLS.
      auto_tls: TLS with a key pair that is made for this master; `certificate` is what its workers trust.
      trusted_ca_file: with `client_cert_auth`, who may sign the workers' certificates.
      token: what every worker must join with. Default: $SYNCBN_TOKEN; without it, each job has the token of its first
        join.
      state_dir: a directory that keeps the running statistics, for the master that is started with it next. One master
        uses it at a time.
      http_address: where to serve the status page, metrics and probes by HTTP, without TLS: "HOST:PORT" (port 0: any free
        one), or "off". Default: $SYNCBN_HTTP_ADDRESS, and if that is taken, a warning in the log; without it, nowhere.
      http_token: what readers of the status page must bear, as a password; "" for nothing. Metrics and probes need none.
        Default: $SYNCBN_INSPECTION_TOKEN, else `token`.

    Errors: as `syncbn-master` has them, as exceptions: an address in use, an address beyond loopback without TLS, a
    state directory that another master uses or whose file is damaged.

    Use it in a `with` block, whose end shuts it down.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:0",
        *,
        insecure: bool = False,
        cert_file: Optional[Any] = None,
        key_file: Optional[Any] = None,
        trusted_ca_file: Optional[Any] = None,
        client_cert_auth: bool = False,
        auto_tls: bool = False,
        token: Optional[str] = None,
        state_dir: Optional[Any] = None,
        http_address: Optional[str] = None,
        http_token: Optional[str] = None,
    ) -> None:
        self._process: Optional[_Process] = None
        self._asking = threading.RLock()  # A finalizer may shut it down, on the thread that asks.
        self._pid = os.getpid()
        _forks.refuse()
        token = _arguments.token(os.environ.get("SYNCBN_TOKEN") or None if token is None else token)
        files = {"cert_file": cert_file, "key_file": key_file, "trusted_ca_file": trusted_ca_file}
        files["state_dir"] = state_dir
        options: Dict[str, Any] = {"address": _arguments.text("address", address, 4096)}
        options.update((name, _arguments.path(name, file)) for name, file in files.items())
        options.update(insecure=_arguments.truth("insecure", insecure))
        options.update(client_cert_auth=_arguments.truth("client_cert_auth", client_cert_auth))
        settings = {"options": options, "http": _http_settings(http_address)}
        reader = os.environ.get("SYNCBN_INSPECTION_TOKEN") or token if http_token is None else http_token
        secrets = {"SYNCBN_TOKEN": token or "", "SYNCBN_INSPECTION_TOKEN": _arguments.token(reader or None) or ""}
        with contextlib.ExitStack() as stack:
            self._certificate: Optional[str] = None
            if _arguments.truth("auto_tls", auto_tls):
                if cert_file is not None or key_file is not None:
                    raise _arguments.refused("auto_tls makes a certificate; cert_file and key_file name another one")
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="syncbn-"))
                options.update(_key_pair(options["address"], folder))
                self._certificate = pathlib.Path(options["cert_file"]).read_text()
            self._process = _Process(settings, secrets)  # The master reads the files before it is ready.
        self._target, self._process_id = self._process.target, self._process.pid
        self._http_address = self._process.http_address
        if self._process.http_failure is not None:
            _logger.warning("no status page: %s", self._process.http_failure)
        if self._http_address is not None:
            _logger.info("status page, metrics and probes on http://%s/", self._http_address)
        _open.add(self)

    @property
    def target(self) -> str:
        """The target that workers pass."""
        return self._target

    @property
    def http_address(self) -> Optional[str]:
        """The address of the status page, metrics and probes, as "127.0.0.1:8080"; None if they are not served."""
        return self._http_address

    @property
    def certificate(self) -> Optional[str]:
        """With `auto_tls`: the certificate (PEM) that workers trust, by a file with it as their `trusted_ca_file`."""
        return self._certificate

    @property
    def pid(self) -> Optional[int]:
        """The process that serves."""
        return self._process_id

    def workers(self) -> int:
        """The number of workers' streams that are open now, over all groups; 0 once the master has ended."""
        with self._asking:
            process = self._process
            return 0 if process is None or os.getpid() != self._pid else process.workers() or 0

    def shutdown(self, grace: float = 1.0) -> None:
        """Tells every worker, lets streams drain for at most `grace` seconds, and ends. Twice is harmless."""
        grace = min(_arguments.seconds("grace", grace), _MOST_GRACE)
        with self._asking:
            process, self._process = self._process, None
        if process is not None and os.getpid() == self._pid:
            process.end(grace)

    def __enter__(self) -> "Master":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.shutdown(grace=0.0)

    def __reduce__(self) -> Any:
        raise TypeError("a Master belongs to one process: pass its target to others")

    def __repr__(self) -> str:
        return f"<syncbn.Master {self._target}{'' if self._process else ' (ended)'}>"


_open: "weakref.WeakSet[Master]" = weakref.WeakSet()


def all_open() -> List[Master]:
    """Returns the masters of this process that are open."""
    return list(_open)


def _forget_all() -> None:
    """In a forked child, which the masters do not belong to."""
    for master in all_open():
        process, master._process = master._process, None
        if process is not None:
            process.forget()
    _open.clear()


os.register_at_fork(after_in_child=_forget_all)
