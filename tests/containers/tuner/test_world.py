"""What processes of one training tell each other, and how one of them ends that waits in vain."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kaito_flows.containers.tuner.world import ALONE, World

WAITING = """
import json, sys, threading, time
from datetime import timedelta
from torch import distributed
from kaito_flows.containers.tuner import world

world.IN_VAIN_SECONDS = 2
store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
others = distributed.TCPStore("127.0.0.1", store.port, is_master=False)
if sys.argv[1] == "failed":
    others.set("failure", json.dumps({"exit_code": 14, "code": "diverged", "message": "the loss is nan", "hint": "x"}))
ours = world.World(1, 2, 1, store)
told_to_stop = lambda: sys.argv[1] == "told to stop"
threading.Thread(target=ours.watch, args=(others, told_to_stop), daemon=True).start()
with ours.peers():
    time.sleep(20 if sys.argv[1] != "well" else 6)
print("went on")
"""


@pytest.mark.parametrize(
    ("how", "exit_code", "said"), [("failed", 14, "diverged"), ("told to stop", 137, "peer-lost"), ("well", 0, "")]
)
def test_a_process_that_waits_in_vain_ends_with_what_another_failed_with(how: str, exit_code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", WAITING, how], capture_output=True, text=True, timeout=200)
    assert done.returncode == exit_code, done.stderr
    if said:
        event = json.loads(done.stdout)
        assert (event["event"], event["exit_code"], event["code"]) == ("worker-failed", exit_code, said)
    else:
        assert done.stdout == "went on\n"


def test_rows_are_shared_out_whole() -> None:
    for size in (1, 2, 3, 8):
        for rows in (0, 1, 5, 7, 8):
            shares = [World(rank, size).share(torch.arange(rows)) for rank in range(size)]
            assert sorted(torch.cat(shares).tolist()) == list(range(rows))
            assert max(map(len, shares)) == World(0, size).largest_share(rows)


def test_one_process_is_its_own_world() -> None:
    tensor = torch.ones(2)
    ALONE.add([tensor])
    ALONE.copy([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert ALONE.totals(1, True) == [1, True]
    assert ALONE.tell("key", lambda: {"a": 1}) == {"a": 1}
    ALONE.wait()
    assert ALONE.waits == []
