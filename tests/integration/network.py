"""Hosts with a cable each to the master's host, made of network namespaces. A cable may lose what goes one way."""

import json
import subprocess
import time
from typing import List

from processes import PATIENCE

PROGRAMS = ("unshare", "nsenter", "ip", "nft")


class Host:
    """A network namespace. It lives for as long as its process, which ends with the pipe that it reads."""

    def __init__(self, inside: List[str], unshare: List[str]) -> None:
        self.process = subprocess.Popen(
            [*inside, *unshare, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("there\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # The reason is on stderr.
        if self.process.stdout.readline() != "there\n":
            raise OSError(f"no network namespace: {self.process.communicate()[1].strip()}")
        self.inside = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(self.process.pid)]

    def run(self, *command: str) -> str:
        """Runs a command in this namespace. Returns: what it prints. Raises: OSError if it fails."""
        done = subprocess.run([*self.inside, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def lose(self, interface: str, match: str = "") -> None:
        """Drops what arrives by this interface, unnoticed by its sender; with `match`, of nft, only what it describes."""
        self.run("nft", f"add rule inet cuts arriving iifname {interface} {match} counter drop")

    def heal(self) -> None:
        self.run("nft", "flush chain inet cuts arriving")

    def dropped(self) -> int:
        """Returns: the number of packets that the present rules have dropped."""
        rules = json.loads(self.run("nft", "-j", "list chain inet cuts arriving"))["nftables"]
        parts = [part for item in rules if "rule" in item for part in item["rule"]["expr"]]
        return sum(part["counter"]["packets"] for part in parts if "counter" in part)

    def await_dropped(self) -> None:
        end = time.monotonic() + PATIENCE
        while self.dropped() == 0:
            assert time.monotonic() < end, "nothing came that could be dropped"

    def close(self) -> None:
        self.process.communicate()


class Network:
    """The master's host, which is 10.77.R.1 to rank R, and a host for each rank. Raises: OSError if it is not allowed."""

    def __init__(self, world_size: int) -> None:
        self.master = Host([], ["unshare", "--user", "--map-root-user", "--net"])
        self.master.run("ip", "link", "set", "dev", "lo", "up")
        self.ranks = [self._host(rank) for rank in range(world_size)]
        for host in [self.master, *self.ranks]:
            host.run("nft", "add table inet cuts")
            host.run("nft", "add chain inet cuts arriving { type filter hook prerouting priority -300; }")

    def cut(self, rank: int, direction: str) -> Host:
        """Loses what goes "to master" or "to worker". Returns: the host on whose side it is dropped."""
        side, interface = (self.master, f"rank{rank}") if direction == "to master" else (self.ranks[rank], "master")
        side.lose(interface)
        return side

    def close(self) -> None:
        for host in [*self.ranks, self.master]:
            host.close()

    def _host(self, rank: int) -> Host:
        host = Host(self.master.inside, ["unshare", "--net"])
        pid = str(host.process.pid)
        self.master.run("ip", "link", "add", f"rank{rank}", "type", "veth", "peer", "name", "master", "netns", pid)
        self.master.run("ip", "address", "add", f"10.77.{rank}.1/24", "dev", f"rank{rank}")
        self.master.run("ip", "link", "set", "dev", f"rank{rank}", "up")
        host.run("ip", "address", "add", f"10.77.{rank}.2/24", "dev", "master")
        host.run("ip", "link", "set", "dev", "master", "up")
        return host
