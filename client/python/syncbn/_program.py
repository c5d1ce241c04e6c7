"""The console script `syncbn-master` of an installed package: a `syncbn.Master` as a program.

It has the flags of addresses and TLS. Those of the log, metrics and limits are the compiled program's, which it becomes
where SYNCBN_MASTER names one.
"""

import argparse
import os
import pathlib
import signal
import sys
import threading
from typing import Any, List, Optional

import syncbn
from syncbn import _arguments


def compiled() -> Optional[pathlib.Path]:
    """The program that SYNCBN_MASTER names, if it does."""
    named = os.environ.get("SYNCBN_MASTER")
    return pathlib.Path(named) if named else None


def _parse(arguments: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="syncbn-master", description="Merges the batch statistics of training workers.")

    def variable(flag: str) -> Optional[str]:
        return os.environ.get("SYNCBN_" + flag.strip("-").replace("-", "_").upper())

    def text(flag: str, default: Optional[str], told: str) -> None:
        parser.add_argument(flag, default=variable(flag) or default, help=told)

    def seconds(flag: str, default: float, told: str) -> None:
        parser.add_argument(flag, type=float, default=variable(flag) or default, help=told)

    def switch(flag: str, told: str) -> None:
        parser.add_argument(flag, action="store_true", default=variable(flag) in ("1", "true", "on", "yes"), help=told)

    text("--address", "127.0.0.1:50051", "HOST:PORT (port 0: any free one) or unix:PATH; default: %(default)s")
    switch("--insecure", "listen beyond loopback without TLS")
    text("--cert-file", None, "PEM certificate: with it and its key, TLS alone is spoken")
    text("--key-file", None, "PEM key of the certificate")
    text("--trusted-ca-file", None, "PEM certificates that sign the workers'; with --client-cert-auth")
    switch("--client-cert-auth", "refuse workers without a trusted certificate")
    text("--http-address", None, "where to serve the status page, metrics and probes: HOST:PORT, or off; default: off")
    seconds("--exit-timeout", 5.0, "seconds that workers are given to drain at a signal; default: %(default)s")
    seconds("--max-lifetime", 0.0, "exit after this many seconds; 0: never")
    parser.add_argument("--version", action="version", version=f"syncbn-master {syncbn.__version__}")
    return parser.parse_args(arguments)


def run(arguments: List[str]) -> int:
    """Serves until SIGINT or SIGTERM. Returns: 0, or 2 for flags with which no master can serve."""
    program = compiled()
    if program is not None:
        if not program.is_file():
            print(f"syncbn-master: SYNCBN_MASTER is {program}, and there is no such program", file=sys.stderr)
            return 2
        os.execv(program, ["syncbn-master", *arguments])
    given = _parse(arguments)
    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
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
        return 2
    if master.http_address is not None:
        print(f"status page, metrics and probes on http://{master.http_address}/", file=sys.stderr)
    print(f"syncbn-master ready on {master.target}", flush=True)
    ended.wait(min(lifetime, threading.TIMEOUT_MAX) or None)
    master.shutdown(grace)
    return 0


def main() -> int:
    return run(sys.argv[1:])
