"""A flow run that rents a node, as a process that tests kill: `python -m tenant FLOW_RUN_ID NAMESPACE FOLDER`.

Everything is the product's: settings, Azure's SDK, the cluster, the tenancy; only the training is left out. It writes
`FOLDER/ready` when it has its node, and ends when there is `FOLDER/end`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from arm_fixtures import A100
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run as current_run

from kaito_flows.nodes import NodeRequest, Offer, open_nodes, renting
from kaito_flows.nodes.aks import AksPools
from kaito_flows.settings import Settings
from kaito_flows.tasks.provision_nodes import Tenancy


@flow(name="tenant")
def tenant(namespace: str, folder: str) -> str:
    """Have a node for a while."""
    run_id = str(current_run.id)
    offers = (Offer(A100, 1, price_usd_hour=3.67),)
    request = NodeRequest("w", namespace=namespace, run_id=run_id, gpus=1, offers=offers, count=1)
    with Tenancy(request, open_nodes(Settings())) as tenancy:
        tenancy.begin()
        name = tenancy.lease().name
        Path(folder, "ready").touch()
        while not Path(folder, "end").exists():
            time.sleep(0.02)
    return name


if __name__ == "__main__":
    renting._NODE_SECONDS, AksPools.look_seconds = 0.1, 0.3
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(sys.argv[1])  # type: ignore[arg-type]
    run_flow(tenant, flow_run=run, parameters={"namespace": sys.argv[2], "folder": sys.argv[3]})
