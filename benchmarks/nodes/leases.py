"""How many requests to Azure Resource Manager a lease takes: the product's own code, and the stand-in that tests it.

Time passes only when somebody waits, in the stand-in, too, so that a lease of a day takes a second.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

from kaito_flows.nodes import NodeRequest, Offer
from kaito_flows.nodes.aks import AksPools
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from arm import Azure
from arm_fixtures import A100, A100_FAMILY, PoolNodes, SteadyClock

BOOT_SECONDS = 240.0
# As long as Azure CLI's recordings have it for a change of a pool.
UPDATE_SECONDS = 20.0
RENEW_SECONDS = 30.0


def count_requests(folder: Path, hours: float) -> Counter[str]:
    """The requests of a lease, from the check to the release, whose run has its nodes for so long; by HTTP method."""
    azure = Azure(folder)
    azure.offer(A100, A100_FAMILY, cores=24, limit=48)
    azure.boot_seconds, azure.update_seconds = BOOT_SECONDS, UPDATE_SECONDS
    azure.start()
    steady = SteadyClock(azure)
    request = NodeRequest("simulated", gpus=1, namespace="default", run_id="run", offers=(Offer(A100, 1),))
    try:
        with (
            mock.patch.dict(os.environ, azure.environment()),
            mock.patch("kaito_flows.nodes.aks.time", steady),
            mock.patch("kaito_flows.nodes.azure.arm.time", steady),
            mock.patch("kaito_flows.nodes.renting.time", steady),
        ):
            nodes = RentedNodes(AksPools.connect(Settings()), PoolNodes(azure), Settings())  # type: ignore[arg-type]
            nodes.check(request)
            lease = nodes.lease(request, lambda *_: None, steady)  # type: ignore[arg-type]
            while steady.passed < hours * 3600:
                steady.sleep(RENEW_SECONDS)
                lease = nodes.renew(lease, followed=True)
            nodes.release(request.holder)
    finally:
        azure.stop()
    return Counter(method for method, _ in azure.calls)
