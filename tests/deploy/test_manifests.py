"""The Kubernetes manifests: they fit the published schemas, where those are here, and the master that there is."""

import os
import pathlib
import re
import subprocess
from typing import Any, Iterator, List

import pytest

yaml = pytest.importorskip("yaml")
ROOT = pathlib.Path(__file__).resolve().parents[2]
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
DEPS = pathlib.Path(os.environ.get("SYNCBN_DEPS", pathlib.Path.home() / ".cache/syncbn"))
PATIENCE = 600.0


def containers(value: Any) -> Iterator[Any]:
    """The containers in a resource, at any depth."""
    if isinstance(value, list):
        for entry in value:
            yield from containers(entry)
    elif isinstance(value, dict):
        yield from value.get("containers", [])
        for entry in value.values():
            yield from containers(entry)


def masters() -> List[Any]:
    resources = [resource for path in MANIFESTS for resource in yaml.safe_load_all(path.read_text())]
    return [found for found in containers(resources) if found["name"] == "master"]


def check(*files: pathlib.Path) -> "subprocess.CompletedProcess[str]":
    if not list(DEPS.glob("manifests/*/.complete")):
        pytest.skip("the schemas are not here; tools/check_manifests fetches them")
    return subprocess.run(
        [ROOT / "tools/check_manifests", *files],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
    )


def test_the_master_knows_every_argument() -> None:
    told = subprocess.run([os.environ["SYNCBN_MASTER"], "--help"], capture_output=True, text=True, timeout=60).stdout
    known = set(re.findall(r"--[\w-]+", told))
    arguments = [argument.split("=")[0] for master in masters() for argument in master["args"]]
    assert len(masters()) == 2 and arguments
    assert [argument for argument in arguments if argument not in known] == []


def test_a_master_is_probed_where_it_serves() -> None:
    for master in masters():
        [address] = [argument for argument in master["args"] if argument.startswith("--http-address=")]
        ports = {port["name"]: port["containerPort"] for port in master["ports"]}
        assert address.endswith(f":{ports['http']}")
        assert master["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
        assert master["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}


def test_prometheus_finds_the_port_of_the_service() -> None:
    resources = [resource for path in MANIFESTS for resource in yaml.safe_load_all(path.read_text())]
    [service] = [found for found in resources if found["kind"] == "Service"]
    [monitor] = [found for found in resources if found["kind"] == "ServiceMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_a_master_has_no_rights() -> None:
    for master in masters():
        assert master["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }


def test_the_manifests_fit_the_schemas() -> None:
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 6


def test_a_field_that_no_schema_has_is_seen(tmp_path: pathlib.Path) -> None:
    cases = (
        ("jobset.yaml", "backoffLimit", "backofLimit"),
        ("master.yaml", "replicas:", "replica:"),
        ("service-monitor.yaml", "honorLabels", "honourLabels"),
    )
    for name, field, wrong in cases:
        path = tmp_path / name
        path.write_text((ROOT / "deploy/kubernetes" / name).read_text().replace(field, wrong))
        done = check(path)
        assert done.returncode == 1 and wrong.rstrip(":") in done.stdout, done.stdout + done.stderr
