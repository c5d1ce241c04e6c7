"""The master through grpcurl, and the session of PROTOCOL.md."""

import json
import pathlib
import re
import subprocess
from typing import List

from processes import GRPCURL, PATIENCE, Master, await_arrival, grpcurl, inspect

PROTOCOL = pathlib.Path(__file__).parents[2] / "proto" / "PROTOCOL.md"


def test_list_and_describe(master: Master) -> None:
    services = grpcurl(master.target, "list").split()
    assert {
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "syncbn.v1.InspectionService",
        "syncbn.v1.StatisticsService",
    } <= set(services)
    for service in services:
        assert "service" in grpcurl(master.target, "describe", service)
    assert "repeated .syncbn.v1.Contribution contributions" in grpcurl(
        master.target, "describe", "syncbn.v1.WorkerFrame"
    )


def test_health(master: Master) -> None:
    assert json.loads(grpcurl(master.target, "grpc.health.v1.Health/Check")) == {"status": "SERVING"}


def frames_of_protocol() -> List[str]:
    """The worker's frames of the session that PROTOCOL.md shows."""
    return re.findall(r"grpcurl -plaintext -d '(\{\"join\".*?\})' ", PROTOCOL.read_text(), re.DOTALL)


def test_a_round_by_hand_as_the_protocol_shows(master: Master) -> None:
    frames = frames_of_protocol()
    assert len(frames) == 2
    processes = []
    for rank, frame in enumerate(frames):
        if rank > 0:
            await_arrival(master.target, "bn1", [0])
        processes.append(
            subprocess.Popen(
                [GRPCURL, "-plaintext", "-d", frame, master.target, "syncbn.v1.StatisticsService/Synchronize"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        decoder, at, answers = json.JSONDecoder(), 0, []
        while at < len(output.rstrip()):
            answer, at = decoder.raw_decode(output, at)
            answers.append(answer)
            at += len(output[at:]) - len(output[at:].lstrip())
        results = [result for answer in answers for result in answer.get("results", [])]
        assert results[0]["key"]["layer"] == "bn1"
        assert results[0]["moments"] == {"count": "4", "mean": [2.5], "var": [1.25], "backward_required": True}
    layer = inspect(master.target, "GetLayer", layer="bn1")
    assert layer["batch"]["mean"] == [2.5]
    assert layer["summary"]["rounds_completed"] == "1"
    groups = inspect(master.target, "ListGroups")["groups"]
    assert [(g["job"], g["group"], g["world_size"]) for g in groups] == [("default", "default", 2)]
