"""The dependency rule that Bazel's visibility cannot enforce: which headers each folder may include.

Reads every #include of the C++ and CUDA sources. The rule is the table RULES below; README.md names the folders.
"""

import pathlib
import re
from typing import List

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
SOURCES = (".h", ".cc", ".c", ".cu", ".cuh")

GRPC = r"grpc(pp)?/|.*\.pb\.h$|google/"
ABSL = r"absl/"
SQLITE = r"sqlite3\.h$"
CONCURRENCY = r"(thread|mutex|condition_variable|atomic|chrono|future|pthread\.h|shared_mutex)$"

# Folder, headers of ours that it may include, other headers that it must not include. The longest folder counts.
RULES = [
    ("kernels", r"kernels/", rf"{GRPC}|{ABSL}"),
    ("vocabulary", r"vocabulary/|kernels/eps_mode\.h$", rf"{GRPC}|{CONCURRENCY}"),
    ("vocabulary/wire", r"vocabulary/|plumbing/|syncbn/v1/", r"$^"),
    (
        "server/core",
        r"server/core/|vocabulary/|kernels/(moments|coefficients)\.h$|plumbing/(check|vector_pool)\.h$",
        rf"{GRPC}|{CONCURRENCY}|{SQLITE}",
    ),
    ("plumbing", r"plumbing/", r"$^"),
    ("server/log", r"server/(core|log)/|plumbing/", r"grpc(pp)?/|.*\.pb\.h$"),
    ("server/state", r"server/(core|log|state)/|vocabulary/|plumbing/|syncbn/v1/", r"grpc(pp)?/"),
    ("server/rpc", r"server/(core|log|rpc|state)/|vocabulary/|plumbing/|syncbn/v1/", r"$^"),
    ("server/http", r"server/(http/|core/secret\.h$|rpc/(listen_address|listener|secrets)\.h$)|vocabulary/|plumbing/|syncbn/v1/", r"$^"),
    ("server", r"server/|vocabulary/|plumbing/", r"$^"),
    ("client/cc", r"client/cc/|kernels/|vocabulary/|plumbing/|syncbn/v1/", r"$^"),
    (
        "client/cc/session",
        r"client/cc/(session/|errors\.h$)|vocabulary/|plumbing/(check|utf8)\.h$",
        rf"{GRPC}|{CONCURRENCY}|{ABSL}(synchronization/|time/clock\.h)",
    ),
    ("client/c", r"client/(cc|c)/|kernels/|vocabulary/|plumbing/|server/(master_server|http/http_server)\.h$", r"$^"),
    ("client/examples", r"client/(cc|c)/|kernels/", r"$^"),
]
OURS = re.compile(r"(kernels|plumbing|vocabulary|server|client|tests|syncbn)/")


def violations(path: str, text: str) -> List[str]:
    """Returns the violations in the includes of one source, whose path is relative to the root."""
    rules = [rule for rule in RULES if path.startswith(rule[0] + "/")]
    if not rules:
        return []
    _, allowed, forbidden = max(rules, key=lambda rule: len(rule[0]))
    if path == "client/c/syncbn.h":
        return [f"{path} includes {name}" for _, name in INCLUDE.findall(text) if name not in ("stddef.h", "stdint.h")]
    found = []
    for _, name in INCLUDE.findall(text):
        wrong = not re.match(allowed, name) if OURS.match(name) else re.match(forbidden, name)
        if wrong:
            found.append(f"{path} includes {name}")
    return found


def test_sources() -> None:
    folders = [ROOT / folder for folder in ("kernels", "plumbing", "vocabulary", "server", "client")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    assert len(paths) > 30, "the sources are not where this test looks for them"
    assert [v for path in paths for v in violations(path.relative_to(ROOT).as_posix(), path.read_text())] == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("kernels/cpu/a.cc", '#include "absl/status/status.h"'),
        ("kernels/a.h", '#include "server/core/types.h"'),
        ("server/core/a.cc", "#include <mutex>"),
        ("server/core/a.cc", "#include <sqlite3.h>"),
        ("server/core/a.cc", '#include "syncbn/v1/statistics.pb.h"'),
        ("server/core/a.cc", '#include "kernels/batch_norm.h"'),
        ("server/core/a.cc", '#include "plumbing/log.h"'),
        ("client/cc/a.h", '#include "server/core/types.h"'),
        ("client/cc/session/a.h", '#include "absl/synchronization/mutex.h"'),
        ("client/cc/session/a.cc", '#include "client/cc/clock.h"'),
        ("client/cc/session/a.cc", '#include "syncbn/v1/statistics.pb.h"'),
        ("server/log/a.cc", '#include "grpcpp/server.h"'),
        ("server/state/a.cc", '#include "grpcpp/server.h"'),
        ("server/state/a.cc", '#include "server/rpc/convert.h"'),
        ("plumbing/a.h", '#include "client/cc/worker.h"'),
        ("vocabulary/a.h", '#include "syncbn/v1/statistics.pb.h"'),
        ("client/c/syncbn.h", "#include <string.h>"),
    ],
)
def test_that_a_violation_is_seen(path: str, text: str) -> None:
    assert len(violations(path, text)) == 1


def test_that_what_is_allowed_passes() -> None:
    assert violations("server/core/a.cc", '#include <map>\n#include "kernels/moments.h"') == []
    assert violations("server/core/a.cc", '#include "plumbing/check.h"') == []
