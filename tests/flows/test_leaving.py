"""A process that runs flows ends, whatever became of Prefect's server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from waiting import eventually

# Its events worker has reached the server before the server goes; from then on each event costs seven seconds.
PROGRAM = """
import json, sys, time
import httpx
from prefect import flow
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from kaito_flows.flows.leaving import leave_in_time
from kaito_flows.tasks.artifacts import show_markdown

leave_in_time(3)

def seconds_to_show():
    start = time.monotonic()
    show_markdown("report", "# A report", "of a run")
    return time.monotonic() - start

@flow
def run():
    seconds_to_show()
    EventsWorker.instance().wait_until_empty()
    print("began", flush=True)
    sys.stdin.read()
    for i in range(200):
        emit_event("test.went-on", {"prefect.resource.id": f"test.{i}"})
    print(json.dumps([seconds_to_show() for _ in range(3)]), flush=True)

try:
    run()
except httpx.ConnectError:
    print("ended", flush=True)
"""


def test_a_server_that_goes_away_holds_up_neither_a_run_for_each_artifact_nor_its_process_for_each_event(
    server: Any,
) -> None:
    environment = {**os.environ, "PREFECT_API_URL": server.api, "PREFECT_CLIENT_MAX_RETRIES": "1"}
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "began\n"
        os.killpg(server.process.pid, signal.SIGKILL)
        eventually(lambda: socket.socket().connect_ex(("127.0.0.1", server.port)))
        process.stdin.close()
        first, *others = json.loads(process.stdout.readline())
        assert max(others) < first - 1, "it tried again what it knew to be away"
        assert process.stdout.readline() == "ended\n"
        ended = time.monotonic()
        process.wait(timeout=30)
        assert time.monotonic() - ended > 2, "it waited for the server, for a while"
    finally:
        process.kill()
        process.wait()
