"""The process of a `syncbn.Master`: run by path, it loads libsyncbn.so and nothing else of weight.

Argument: a JSON object of the settings. Descriptor 1 gets a line of JSON when the master serves or has failed to, another
for each line "workers" on descriptor 0, with the number of workers' streams that are open, and one when it has ended. A
number on descriptor 0 ends it, with so many seconds of grace. It ends by itself when the process that wanted it ends.
"""

import json
import os
import select
import signal
import sys
import threading
import time
import types
from typing import Any, Dict, Optional, Tuple

# A launcher's signals go to every process of a job. Those are for the program, whose end is this process's end.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

ASK_WORKERS = b"workers\n"
UNAVAILABLE = 14


def start_time(pid: int) -> Optional[str]:
    """The start of a process, which tells it from a later one of the same number; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def wait_for_end(owner: Dict[str, Any]) -> None:
    """Returns when the process has ended that wanted this master."""
    if owner["descriptor"] is not None:
        poll = select.poll()
        poll.register(owner["descriptor"], select.POLLIN)
        while not poll.poll():
            pass
        return
    while start_time(owner["pid"]) == owner["start_time"]:  # A kernel without pidfd_open.
        time.sleep(0.2)


def report(**what: Any) -> None:
    try:
        os.write(1, json.dumps(what).encode() + b"\n")
    except OSError:  # Nobody reads any more.
        pass


def library() -> Any:
    """syncbn._library, without what `import syncbn` imports."""
    package = types.ModuleType("syncbn")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["syncbn"] = package
    from syncbn import _library

    return _library


class Server:
    def __init__(self) -> None:
        self._library: Any = None
        self._lib: Any = None
        self._handle: Optional[int] = None

    def start(self, options: Dict[str, Any]) -> str:
        """Returns the target."""
        loaded = self._library = library()
        self._lib = loaded.lib
        if hasattr(loaded.lib, "syncbn_set_log"):
            loaded.lib.syncbn_set_log(None, None)  # To stderr: nobody takes lines here.
        words = {name: loaded.text(value) if isinstance(value, str) else value for name, value in options.items()}
        given = loaded.MasterOptions(**words, token=loaded.text(os.environ.pop("SYNCBN_TOKEN", "") or None))
        self._handle = loaded.create(self._lib.syncbn_master_start, loaded.ctypes.byref(given))
        return str(self._lib.syncbn_master_target(self._handle).decode())

    def serve_http(self, address: str) -> str:
        """Returns the address with the actual port."""
        text = self._library.text
        token = text(os.environ.pop("SYNCBN_INSPECTION_TOKEN", "") or None)
        self._library.call(self._lib.syncbn_master_serve_http, self._handle, text(address), token)
        return str(self._lib.syncbn_master_http_address(self._handle).decode())

    def workers(self) -> int:
        return int(self._lib.syncbn_master_workers(self._handle))

    def end(self, grace: float) -> None:
        if self._handle is not None:
            self._lib.syncbn_master_shutdown(self._handle, int(grace * 1e9))

    def end_with(self, owner: Dict[str, Any]) -> None:
        wait_for_end(owner)
        self.end(0.0)
        os._exit(0)


def describe(error: Exception) -> Dict[str, Any]:
    fields = {name: getattr(error, name, None) for name in ("message", "code", "reason", "layer", "ranks")}
    if fields["message"] is None:
        fields.update(message=f"{type(error).__name__}: {error}", code=13, reason="", layer="", ranks=())
    return fields


def serve_http(server: Server, wanted: Optional[Dict[str, Any]]) -> Tuple[Optional[str], Optional[str]]:
    """Returns the address, and why there is none although it is wanted."""
    if wanted is None:
        return None, None
    try:
        return server.serve_http(wanted["address"]), None
    except Exception as error:
        if wanted["required"] or describe(error)["code"] != UNAVAILABLE:
            raise
        return None, str(describe(error)["message"])


def main() -> None:
    settings = json.loads(sys.argv[1])
    # No child of the program's: it may wait for all of its children.
    if os.fork():
        os._exit(0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    server = Server()
    threading.Thread(target=server.end_with, args=(settings["owner"],), daemon=True).start()
    try:
        target = server.start(settings["options"])
        http_address, http_failure = serve_http(server, settings["http"])
    except Exception as error:
        report(error=describe(error))
        os._exit(1)
    report(target=target, pid=os.getpid(), http_address=http_address, http_failure=http_failure)
    request = os.read(0, 64)
    while request == ASK_WORKERS:  # The other end asks again only once it has the answer.
        report(workers=server.workers())
        request = os.read(0, 64)
    server.end(float(request) if request else 0.0)
    report(ended=True)
    os._exit(0)


if __name__ == "__main__":
    main()
