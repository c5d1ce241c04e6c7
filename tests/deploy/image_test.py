#!/usr/bin/env python3
"""Tries an OCI image of syncbn-master: image_test.py DIRECTORY.

The layout's index, manifest and configuration are what containers are started by. Then its root file system is unpacked,
and the master runs in it as the image's user, with the image's entry point and a root that it cannot write to: it becomes
ready, and answers Kubernetes' probes. As root.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from typing import Any, Dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSION = (ROOT / "VERSION").read_text().strip()
PATIENCE = 120.0


def blob(layout: pathlib.Path, descriptor: Dict[str, Any]) -> pathlib.Path:
    """The file of a descriptor, whose size and digest are checked."""
    algorithm, _, digest = descriptor["digest"].partition(":")
    path = layout / "blobs" / algorithm / digest
    assert path.stat().st_size == descriptor["size"], path
    assert hashlib.new(algorithm, path.read_bytes()).hexdigest() == digest, path
    return path


def read(layout: pathlib.Path, descriptor: Dict[str, Any]) -> Any:
    return json.loads(blob(layout, descriptor).read_text())


def check_layout(layout: pathlib.Path) -> Any:
    """Returns the manifest and the configuration."""
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == VERSION
    manifest = read(layout, entry)
    config = read(layout, manifest["config"])
    assert config["os"] == "linux"
    settings = config["config"]
    assert settings["User"] == "65532:65532"
    assert settings["Entrypoint"] == ["/usr/bin/syncbn-master"]
    assert set(settings["ExposedPorts"]) == {"50051/tcp", "8080/tcp"}
    assert settings["Labels"]["org.opencontainers.image.version"] == VERSION
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"])
    return manifest, settings


# Run by sh as: ROOT USER:GROUP FOLDER PROGRAM...; in namespaces of its own.
RUN = """set -e
root=$1 user=$2 folder=$3
shift 3
# The root is bound to itself, so that it can be made read-only.
mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
ip link set lo up
if chroot --userspec="$user" "$root" touch /tmp/written 2>/dev/null; then echo "the root can be written to"; exit 1; fi
chroot --userspec="$user" "$root" "$@" >"$folder/stdout" &
master=$!
until grep -q ready "$folder/stdout"; do kill -0 $master; done
for path in livez readyz metrics; do
  "$PYTHON" -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=60).status)' \
    "http://127.0.0.1:8080/$path"
done
kill $master
wait $master
cat "$folder/stdout"
"""


def check_run(root: pathlib.Path, folder: str, settings: Any) -> None:
    flags = ["--address=0.0.0.0:50051", "--insecure", "--http-address=0.0.0.0:8080", "--max-lifetime=100"]
    arguments = [str(root), settings["User"], folder, *settings["Entrypoint"], *flags]
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", RUN, "sh", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ["200", "200", "200", "syncbn-master ready on 0.0.0.0:50051", "syncbn-master stopped"]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr


def main(layout: pathlib.Path) -> None:
    manifest, settings = check_layout(layout)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "root"
        root.mkdir()
        for layer in manifest["layers"]:
            with tarfile.open(blob(layout, layer)) as tar:
                tar.extractall(root)
        passwd = (root / "etc/passwd").read_text()
        assert ":65532:65532:" in passwd
        check_run(root, folder, settings)
    print(f"{layout}: its configuration is right, and the master runs as user 65532 on a read-only root")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
