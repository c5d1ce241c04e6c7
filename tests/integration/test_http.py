"""The master's pages: metrics, probes, text, JSON, and the page for people in a browser."""

import base64
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, List, Tuple

import pytest
from processes import GRPCURL, MASTER, PATIENCE, Master, WorkerProcess, inspect

import syncbn

ROOT = pathlib.Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool")
PROMETHEUS = shutil.which("prometheus")
CHROMIUM = shutil.which("chromium")


class HttpMaster(Master):
    """A master with its pages, whose log goes to a file."""

    def __init__(self, log: pathlib.Path, *flags: str, **options: Any) -> None:
        self.log = log
        self.stderr = log.open("w")
        super().__init__("--http-address", "127.0.0.1:0", *flags, stderr=self.stderr, **options)
        self.address = re.search(r"http://([0-9.:]+)/", self.await_line("http://"))[1]  # type: ignore[index]

    def await_line(self, text: str) -> str:
        """Returns the first line of the log with the text."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for line in self.log.read_text().splitlines():
                if text in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line has {text!r}:\n{self.log.read_text()}")

    def get(self, path: str, method: str = "GET", **headers: str) -> Tuple[int, str]:
        """Returns status and body."""
        request = urllib.request.Request(f"http://{self.address}{path}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def samples(self) -> Dict[str, float]:
        """The metrics, by name and labels."""
        status, text = self.get("/metrics")
        assert status == 200, text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@pytest.fixture
def pages(start: Callable[..., Any], tmp_path: pathlib.Path) -> HttpMaster:
    return start(HttpMaster, tmp_path / "log")


def train(target: str, rounds: int, job: str = "train", group: str = "g") -> None:
    """Two workers; rank 1 contributes only once rank 0 has: it is always the last. Channel 1 of "bn" is constant."""

    def work(rank: int, errors: List[BaseException]) -> None:
        try:
            with syncbn.Worker(target=target, job=job, group=group, rank=rank, world_size=2) as worker:
                for step in range(rounds):
                    if rank == 1:
                        await_arrival_of(target, job, group, 0, step)
                    worker.synchronize("bn", 4, [0.5, 1.0, -2.0], [8.0, 0.0, 4.0])
        except BaseException as error:  # pylint: disable=broad-except
            errors.append(error)

    errors: List[BaseException] = []
    threads = [threading.Thread(target=work, args=(rank, errors)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not errors, errors[0]


def await_arrival_of(target: str, job: str, group: str, rank: int, sequence: int) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for pending in inspect(target, "GetGroup", job=job, group=group).get("pending", []):
            arrived = int(pending["key"].get("sequence", 0)) == sequence and rank in pending.get("arrived_ranks", [])
            if arrived:
                return
    raise AssertionError("it has not arrived")


def test_probes_and_unknown_paths(pages: HttpMaster) -> None:
    assert pages.get("/livez") == (200, "alive\n")
    assert pages.get("/readyz") == (200, "ready\n")
    assert pages.get("/healthz") == (200, "ready\n")
    assert pages.get("/livez", "HEAD") == (200, "")
    assert pages.get("/nothing")[0] == 404
    assert pages.get("/api/nothing")[0] == 404
    assert pages.get("/metrics", "POST")[0] == 405
    assert pages.get("/api/group?job=a&group=b")[0] == 404
    assert pages.get("/api/group?parts=everything")[0] == 400
    # A page of another site cannot read it under a name of its own.
    for host in ("rebound.example", "127.rebound.example", "127.0.0.1.rebound.example:8080", "[::1]rebound.example"):
        assert pages.get("/statusz", Host=host)[0] == 421, host
    for host in ("localhost:1", "127.0.0.1", "127.8.9.10:8080", "[::1]", "[::1]:8080"):
        assert pages.get("/statusz", Host=host)[0] == 200, host


def test_readiness_follows_the_listeners(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sock"
    master = start(HttpMaster, tmp_path / "log", address=f"unix:{path}")

    def await_status(wanted: int) -> str:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            status, text = master.get("/readyz")
            if status == wanted:
                return text
        raise AssertionError(f"/readyz is not {wanted}")

    await_status(200)
    path.unlink()
    path.mkdir()  # So that it cannot be opened again.
    (path / "file").touch()
    assert "listening" in await_status(503)
    assert master.get("/livez")[0] == 200
    (path / "file").unlink()
    path.rmdir()
    await_status(200)


def test_metrics_count_what_happens(pages: HttpMaster) -> None:
    train(pages.target, 5)
    samples = pages.samples()
    group = 'job="train",group="g"'
    assert samples[f'syncbn_rounds_total{{{group},phase="forward",result="completed"}}'] == 5
    assert samples[f'syncbn_round_duration_seconds_count{{{group},phase="forward"}}'] == 5
    assert samples[f'syncbn_last_arrivals_total{{{group},rank="1"}}'] == 5
    assert samples[f'syncbn_last_arrivals_total{{{group},rank="0"}}'] == 0
    assert samples[f'syncbn_lateness_seconds_total{{{group},rank="1"}}'] > 0
    assert samples[f'syncbn_contributions_total{{{group},result="accepted"}}'] == 10
    assert samples[f'syncbn_joins_total{{{group},result="joined"}}'] == 2
    assert samples[f'syncbn_workers{{{group},state="left"}}'] == 2
    assert samples[f"syncbn_oldest_round_age_seconds{{{group}}}"] == 0
    assert samples["syncbn_groups"] == 1
    assert samples["process_open_fds"] > 3
    service = 'grpc_type="bidi_stream",grpc_service="syncbn.v1.StatisticsService",grpc_method="Synchronize"'
    assert samples[f"grpc_server_started_total{{{service}}}"] == 2
    assert samples[f'grpc_server_handled_total{{{service},grpc_code="OK"}}'] == 2


def test_ranks_beyond_the_limit_have_no_series(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(HttpMaster, tmp_path / "log", "--metrics-max-ranks", "1")
    train(master.target, 1)
    assert not [name for name in master.samples() if "rank=" in name]


def test_ranks_that_never_joined_have_no_series(start: Callable[..., Any], pages: HttpMaster) -> None:
    worker = start(WorkerProcess, pages.target, 1, 256, group="mostly absent")
    assert worker.answer()["joined"] == 1
    ranks = [name for name in pages.samples() if 'group="mostly absent"' in name and "rank=" in name]
    assert len(ranks) == 2 and all('rank="1"' in name for name in ranks), ranks


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (tools/install_deps)")
def test_promtool_finds_nothing_to_object_to(pages: HttpMaster) -> None:
    train(pages.target, 1)
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=pages.get("/metrics")[1], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (tools/install_deps)")
def test_alert_rules_and_dashboard_name_metrics_that_exist(pages: HttpMaster) -> None:
    rules = ROOT / "deploy/prometheus/rules.yml"
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(rules)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    train(pages.target, 1)
    text = pages.get("/metrics")[1]
    known = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) | {
        name.split("{")[0].split(" ")[0] for name in text.splitlines() if not name.startswith("#")
    }
    dashboard = (ROOT / "deploy/grafana/syncbn.json").read_text()
    json.loads(dashboard)
    # A counter by reason has no series before the first of its kind.
    known.add("syncbn_streams_closed_total")
    named = set(re.findall(r"\b(?:syncbn|process|grpc_server)_[a-z0-9_]+", rules.read_text() + dashboard))
    assert named and named <= known, named - known


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (tools/install_deps)")
def test_prometheus_scrapes_a_training_run(pages: HttpMaster, tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "scrape_configs:\n- job_name: syncbn\n  scrape_interval: 250ms\n  honor_labels: true\n"
        f"  static_configs:\n  - targets: ['{pages.address}']\n"
    )
    server = subprocess.Popen(
        [
            str(PROMETHEUS), f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        train(pages.target, 3)
        query = urllib.parse.urlencode({"query": 'syncbn_rounds_total{result="completed",phase="forward"}'})
        end = time.monotonic() + PATIENCE
        value = None
        while time.monotonic() < end and value != "3":
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=5) as answer:
                    for result in json.load(answer)["data"]["result"]:
                        assert result["metric"]["job"] == "train" and result["metric"]["group"] == "g"
                        value = result["value"][1]
            except (urllib.error.URLError, ConnectionError):
                pass  # It is starting.
            time.sleep(0.05)
        assert value == "3"
    finally:
        server.kill()
        server.wait(PATIENCE)


def test_statusz_and_the_group_show_who_is_late(pages: HttpMaster) -> None:
    train(pages.target, 4)
    text = pages.get("/statusz")[1]
    assert 'job "train", group "g": 0 of 2 workers, 1 layers, 4 rounds completed' in text
    group = json.loads(pages.get("/api/group?job=train&group=g")[1])
    first, second = group["members"]
    assert float(second["lateness"]["p50"].rstrip("s")) > float(first["lateness"]["p50"].rstrip("s"))
    assert [a["rank"] for a in group["recent"][0]["arrivals"]] == [1, 0]
    assert group["recent"][0]["result"] == "completed"
    layers = json.loads(pages.get("/api/layers?job=train&group=g")[1])["layers"]
    assert layers[0]["channels"]["constantChannels"] == [1]
    assert "members" in group and not json.loads(pages.get("/api/group?job=train&group=g&parts=pending")[1])["members"]


def test_a_taken_port_is_an_error_if_it_was_asked_for(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [MASTER, "--address", "127.0.0.1:0", "--http-address", address, "--max-lifetime", "60"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        )
    assert done.returncode == 1
    assert f'cannot serve HTTP: cannot listen on "{address}"' in done.stderr and "in use" in done.stderr
    assert "ready" not in done.stdout


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


PROBES = ("/livez", "/readyz", "/healthz", "/metrics")
PAGES = ("/", "/page.js", "/style.css", "/statusz", "/api/master", "/api/groups", "/nothing")


@pytest.mark.parametrize(
    "variables, token",
    [
        ({"SYNCBN_TOKEN": "for-workers"}, "for-workers"),
        ({"SYNCBN_TOKEN": "for-workers", "SYNCBN_INSPECTION_TOKEN": "for-readers"}, "for-readers"),
        ({"SYNCBN_INSPECTION_TOKEN": "for-readers"}, "for-readers"),
    ],
)
def test_the_page_needs_the_token(
    start: Callable[..., Any], tmp_path: pathlib.Path, variables: Dict[str, str], token: str
) -> None:
    master = start(HttpMaster, tmp_path / "log", env=variables)
    assert "the page needs the token" in master.await_line("http://")
    for path in PROBES:
        assert master.get(path)[0] == 200
    wrong = ["", "Bearer", "Bearer ", f"Bearer {token}x", f"Token {token}", "Basic !", basic(""), basic(token + "x")]
    if token != "for-workers" and "SYNCBN_TOKEN" in variables:
        wrong.append("Bearer for-workers")
    for path in PAGES:
        for authorization in wrong:
            status, text = master.get(path, Authorization=authorization)
            assert status == 401 and "token" in text and token not in text, (path, authorization)
        for authorization in (f"Bearer {token}", f"bearer {token}", basic(token)):
            assert master.get(path, Authorization=authorization)[0] == (404 if path == "/nothing" else 200)
    assert master.get("/", "HEAD") == (401, "")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{master.address}/", timeout=PATIENCE)
    assert refused.value.headers["WWW-Authenticate"] == 'Basic realm="syncbn"'  # So a browser asks for it.


@pytest.mark.parametrize("variables", [{}, {"SYNCBN_TOKEN": "for-workers"}])
def test_inspection_off_closes_the_page(
    start: Callable[..., Any], tmp_path: pathlib.Path, variables: Dict[str, str]
) -> None:
    master = start(HttpMaster, tmp_path / "log", "--inspection", "off", env=variables)
    for path in PROBES:
        assert master.get(path)[0] == 200
    for path in PAGES:
        status, text = master.get(path, Authorization="Bearer for-workers")
        assert status == 403 and "--inspection off" in text


def test_a_second_master_of_the_host_does_without_the_usual_port(tmp_path: pathlib.Path) -> None:
    """In a network of their own, where nobody else has the port."""
    script = """set -e
        ip link set lo up
        for n in 1 2; do
          "$0" --address 127.0.0.1:0 --max-lifetime 60 >"$1/ready$n" 2>"$1/log$n" &
          until grep -q ready "$1/ready$n"; do kill -0 $!; done
        done
        kill %1 %2
        wait
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "bash", "-c", script, MASTER, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
        env={name: value for name, value in os.environ.items() if name != "SYNCBN_HTTP_ADDRESS"},
    )
    if "unshare" in done.stdout or "ip: command not found" in done.stdout:
        pytest.skip(f"no network of its own: {done.stdout}")
    assert done.returncode == 0, done.stdout
    assert "on http://127.0.0.1:8080/" in (tmp_path / "log1").read_text()
    second = (tmp_path / "log2").read_text()
    assert "no status page" in second and "--http-address gives another" in second and "listens on" in second


def test_the_commit_is_told_everywhere_alike(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    told = subprocess.run([MASTER, "--version"], stdout=subprocess.PIPE, text=True, timeout=PATIENCE).stdout
    [commit] = re.findall(r"\((?:commit (\S+), )?protocol 1, gRPC [\d.]+\)", told)
    master = start(HttpMaster, tmp_path / "log", "--log-format", "json")
    ready = json.loads(master.await_line('"ready"'))
    assert ready["revision"] == commit and (not commit or f"(commit {commit})" in ready["message"])
    [info] = [name for name in master.samples() if name.startswith("syncbn_build_info")]
    assert f'revision="{commit}"' in info
    assert inspect(master.target, "GetMaster").get("revision", "") == commit
    first = master.get("/statusz")[1].splitlines()[0]
    assert f" (commit {commit})," in first if commit else "commit" not in first


def test_sigusr1_writes_the_rounds_to_the_log(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(HttpMaster, tmp_path / "log", "--log-format", "json")
    train(master.target, 2)
    master.process.send_signal(signal.SIGUSR1)
    record = json.loads(master.await_line('"sequence":"1"'))
    assert record["event"] == "recorded_round" and record["result"] == "completed"
    assert record["layer"] == "bn" and record["phase"] == "forward"
    assert re.match(r"1:\+\S+ 0:\+0$", record["arrivals"]), record


def test_the_log_as_json_tells_of_every_worker(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(HttpMaster, tmp_path / "log", "--log-format", "json")
    first = start(WorkerProcess, master.target, 0, 2, job='j"\n', group="g")
    second = start(WorkerProcess, master.target, 1, 2, job='j"\n', group="g")
    assert first.answer()["joined"] == 0 and second.answer()["joined"] == 1
    master.await_line('"complete"')
    first.ask(sum="loss", value=[1.0])
    second.ask(sum="loss", value=[1.0])
    assert first.answer()["result"] == [2.0]
    first.ask(sum="loss", value=[1.0])
    second.process.kill()
    assert first.answer()["error"] == "WORKER_LOST"
    master.await_line("round_failed")
    assert master.terminate() == 0
    records = [json.loads(line) for line in master.log.read_text().splitlines()]
    events = {record.get("event"): record for record in records}
    assert {"ready", "http", "joined", "complete", "lost", "round_failed", "shutdown"} <= set(events)
    assert events["lost"]["rank"] == "1" and events["lost"]["level"] == "info"
    assert events["lost"]["job"] == 'j"\n'
    assert events["round_failed"]["reason"] == "WORKER_LOST" and events["round_failed"]["ranks"] == "1"
    assert "rank 1 contributed last to the sum 0 of vector" in events["round_failed"]["message"]
    assert all(record["time"].endswith("Z") and record["message"] for record in records)


def test_systemd_is_told(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(PATIENCE)
        environment = {**os.environ, "NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000"}
        master = subprocess.Popen(
            [MASTER, "--address", "127.0.0.1:0", "--http-address", "off", "--max-lifetime", "60"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        )
        try:
            told = [notify.recv(100)]
            while b"WATCHDOG=1" not in told:
                told.append(notify.recv(100))
            assert told[0] == b"READY=1"
            master.terminate()
            while b"STOPPING=1" not in told:
                told.append(notify.recv(100))
            assert master.wait(PATIENCE) == 0
        finally:
            master.kill()
            master.wait(PATIENCE)


OPERATIONS = (ROOT / "docs/operations.md").read_text().replace("\\\n", "")
RECIPES = re.findall(r"^    grpcurl (.*)$", OPERATIONS, re.MULTILINE)


def test_each_recipe_of_the_operations_page_runs(pages: HttpMaster) -> None:
    assert len(RECIPES) >= 7
    train(pages.target, 2)
    for recipe in RECIPES:
        assert "127.0.0.1:50051" in recipe
        arguments = shlex.split(recipe.replace("127.0.0.1:50051", pages.target))
        # The stream of rounds has no end as long as its group lives. This master has no token, and takes any.
        done = subprocess.run(
            [GRPCURL, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            env=dict(os.environ, SYNCBN_TOKEN="token"),
        )
        watches = "WatchRounds" in recipe
        assert done.returncode == 0 or (watches and "DeadlineExceeded" in done.stderr), recipe + done.stderr
        assert watches or json.loads(done.stdout), recipe


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width, dark", [(1000, False), (400, True)])
def test_the_page_in_a_browser(pages: HttpMaster, tmp_path: pathlib.Path, width: int, dark: bool) -> None:
    train(pages.target, 6)
    keep = os.environ.get("SYNCBN_SCREENSHOTS")
    picture = pathlib.Path(keep or tmp_path) / f"page-{width}{'-dark' if dark else ''}.png"
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1500", "--virtual-time-budget=4000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        f"--screenshot={picture}", "--dump-dom", f"http://{pages.address}/",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=4 * PATIENCE)
    page = re.sub(r"\s+", " ", done.stdout)
    assert "Rank 1 makes the others wait" in page, page + done.stderr
    assert "Channels constant: 1." in page
    assert "6" in page and "0 of 2" in page
    assert "The master does not answer" not in page
    assert picture.stat().st_size > 10000
