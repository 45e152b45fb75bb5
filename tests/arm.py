"""A stand-in for Azure: Resource Manager with AKS' agent pools and the compute provider's lists, and Entra's tokens.

It is reached as Azure is from behind a company's proxy that looks into TLS: `HTTPS_PROXY` leads to it, and
`REQUESTS_CA_BUNDLE` names the authority that it answers `management.azure.com` by. So what is tested has no switch for
it, and needs none. What it answers is held against the wire types of the SDK, what it is asked, too; error bodies are
those that Azure documents. `python tests/arm.py FOLDER` runs it as a process, and writes the environment to a file.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from arm_proxy import ARM_HOST, CLIENT, LOGIN_HOST, TENANT, Body, Fault, Handler, Refused, certificates
from azure.mgmt.containerservice import models, types
from pydantic import ConfigDict, TypeAdapter, ValidationError

SUBSCRIPTION, GROUP, CLUSTER, REGION = "11111111-2222-3333-4444-555555555555", "ml", "flows", "eastus"
_CLUSTER_ID = (
    f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}/providers/Microsoft.ContainerService"
    f"/managedClusters/{CLUSTER}"
)
_POOLS = _CLUSTER_ID + "/agentPools"
_OPERATIONS = (
    f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.ContainerService/locations/{REGION}/operations"
)  # fmt: skip
_COMPUTE = f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Compute"
_SPOT = "kubernetes.azure.com/scalesetpriority"


def _wire_type(name: str) -> TypeAdapter[Any]:
    """The SDK's TypedDict of that name, which knows every key that goes over the wire, and here no other."""
    for key, value in vars(models).items():
        vars(types).setdefault(key, value)  # what the types name as strings
    for value in vars(types).values():
        if isinstance(value, type) and issubclass(value, dict):
            value.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(getattr(types, name))


def _as_wired(kind: TypeAdapter[Any], body: Body) -> Body:
    """The body, whose keys and values the SDK knows; the types call more keys required than Azure sends."""
    try:
        kind.validate_python(body, strict=True)
    except ValidationError as exc:
        wrong = [error for error in exc.errors() if error["type"] != "missing"]
        assert not wrong, wrong
    return body


AGENT_POOL = _wire_type("AgentPool")
MANAGED_CLUSTER = _wire_type("ManagedCluster")
READ_ONLY = {"eTag", "provisioningState", "currentOrchestratorVersion", "status", "virtualMachineNodesStatus"}


@dataclass
class Failure:
    """How the next operation ends that makes a pool; `told` says whether the pool itself says why."""

    code: str
    message: str
    told: bool = True


@dataclass
class _Pool:
    body: Body
    version: int = 1
    until: float = 0.0
    then: str = "Succeeded"
    operation: str = ""
    failure: Failure | None = None


class Azure:
    """The stand-in; its attributes are what a test sets and reads."""

    def __init__(self, folder: Path, wall: Callable[[], float] = time.time) -> None:
        self.wall = wall
        self.boot_seconds = self.update_seconds = self.delete_seconds = self.abort_seconds = 0.0
        self.page = 100
        self.faults: list[Fault] = []
        self.failures: list[Failure] = []
        self.calls: list[tuple[str, str]] = []
        """Each request to ARM, tries of the SDK's own among them."""
        self.bodies: list[Body] = []
        """Each body of a PUT."""
        self.queries: list[Mapping[str, str]] = []
        """Each query of a DELETE."""
        self.one_at_a_time = False
        """Whether an operation on one pool keeps all others waiting."""
        self.busy_first = False
        """Whether a pool that is being changed is said to be busy before its ETag is looked at."""
        self.allowed: set[str] | None = None
        """The actions that the caller's roles have; None: all."""
        self.sizes: dict[str, Body] = {}
        self.usages: dict[str, list[int]] = {}
        """What is used of a quota, and its limit."""
        self.on_change: Callable[[str, str], None] = lambda name, state: None
        """Told of each pool's state, `Gone` included."""
        self.pools: dict[str, _Pool] = {}
        self.operations: dict[str, Body] = {}
        self.lock = threading.RLock()
        self.token = uuid.uuid4().hex
        self.folder = folder
        self._server: ThreadingHTTPServer | None = None
        self._over = threading.Event()

    # --- running ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen on loopback, in threads of its own."""
        tls = certificates(self.folder)
        (self.folder / "federated-token").write_text("the cluster's word for the pod")
        bound = type("Bound", (Handler,), {"azure": self, "tls": tls})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        self._over.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What a pod has: the four variables that AKS' workload identity puts there, a proxy, and our settings."""
        assert self._server is not None
        proxy = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {
            "AZURE_TENANT_ID": TENANT,
            "AZURE_CLIENT_ID": CLIENT,
            "AZURE_FEDERATED_TOKEN_FILE": str(self.folder / "federated-token"),
            "AZURE_AUTHORITY_HOST": f"https://{LOGIN_HOST}/",
            "HTTPS_PROXY": proxy,
            "https_proxy": proxy,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "REQUESTS_CA_BUNDLE": str(self.folder / "ca.pem"),
            "KAITO_FLOWS_AKS_SUBSCRIPTION": SUBSCRIPTION,
            "KAITO_FLOWS_AKS_RESOURCE_GROUP": GROUP,
            "KAITO_FLOWS_AKS_CLUSTER": CLUSTER,
        }

    def _tick(self) -> None:
        while not self._over.wait(0.02):
            self.settle()

    # --- what a test sets ---------------------------------------------------------------------------------------------

    def offer(self, size: str, family: str, cores: int, limit: int, zones: tuple[str, ...] = ("1", "2", "3")) -> None:
        """Have a size in the region, and a limit for its family."""
        self.sizes[size] = {
            "resourceType": "virtualMachines",
            "name": size,
            "tier": "Standard",
            "size": size.removeprefix("Standard_"),
            "family": family,
            "locations": [REGION],
            "locationInfo": [{"location": REGION, "zones": list(zones), "zoneDetails": []}],
            "capabilities": [
                {"name": "vCPUs", "value": str(cores)},
                {"name": "LowPriorityCapable", "value": "True"},
            ],
            "restrictions": [],
        }
        self.usages[family] = [0, limit]
        self.usages.setdefault("cores", [0, 1000])
        self.usages.setdefault("lowPriorityCores", [0, 1000])

    def restrict(self, size: str, reason: str, zones: tuple[str, ...] = ()) -> None:
        """Keep the subscription from a size: in these zones, or wholly."""
        self.sizes[size]["restrictions"].append(
            {
                "type": "Zone" if zones else "Location",
                "values": [REGION],
                "restrictionInfo": {"locations": [REGION], **({"zones": list(zones)} if zones else {})},
                "reasonCode": reason,
            }
        )

    def put_there(self, name: str, size: str = "Standard_D4s_v5", **properties: Any) -> None:
        """Have a pool that somebody else has made."""
        with self.lock:
            body = self._as_kept(name, {"vmSize": size, "count": 1, "mode": "User", **properties})
            self.pools[name] = _Pool(body)
            self._say(self.pools[name], "Succeeded")

    def change(self, name: str, **properties: Any) -> None:
        """Change a pool behind everybody's back, as somebody at the portal does."""
        with self.lock:
            self.pools[name].body["properties"].update(properties)
            self.pools[name].version += 1

    def state(self, name: str) -> str:
        """A pool's state; `Gone` when there is none."""
        self.settle()
        with self.lock:
            found = self.pools.get(name)
            return str(found.body["properties"]["provisioningState"]) if found else "Gone"

    def names(self) -> list[str]:
        """The pools that are there, one that is being deleted among them."""
        self.settle()
        with self.lock:
            return sorted(self.pools)

    def count(self, method: str = "") -> int:
        """How many requests ARM has had."""
        return sum(1 for made, _ in self.calls if method in ("", made))

    # --- time ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring each operation to where it is by now."""
        with self.lock:
            for name, pool in list(self.pools.items()):
                if pool.operation and self.wall() >= pool.until:
                    self._end(name, pool)

    def _end(self, name: str, pool: _Pool) -> None:
        operation, pool.operation = self.operations[pool.operation], ""
        operation["endTime"] = _written(self.wall())
        if pool.then == "Gone":
            operation["status"] = "Succeeded"
            self._use(pool.body["properties"], -1)
            del self.pools[name]
            self.on_change(name, "Gone")
            return
        operation["status"] = {"Canceled": "Canceled"}.get(pool.then, "Succeeded")
        if pool.failure is not None and pool.then == "Succeeded":
            error = {"code": pool.failure.code, "message": pool.failure.message}
            operation |= {"status": "Failed", "error": error}
            if pool.failure.told:
                pool.body["properties"]["status"] = {"provisioningError": error}
            self._say(pool, "Failed")
        else:
            self._say(pool, pool.then)

    def _begin(self, pool: _Pool, state: str, then: str, seconds: float) -> dict[str, str]:
        name = str(uuid.uuid4())
        self.operations[name] = {"name": name, "status": "InProgress", "startTime": _written(self.wall())}
        pool.operation, pool.then, pool.until = name, then, self.wall() + seconds
        self._say(pool, state)
        return {
            "Azure-AsyncOperation": f"https://{ARM_HOST}{_OPERATIONS}/{name}?api-version=2017-08-31",
            "Retry-After": "10",
        }

    def _say(self, pool: _Pool, state: str) -> None:
        """Have a pool in a state; with each it gets another ETag, as AKS is recorded to do (2026-07-01)."""
        pool.body["properties"]["provisioningState"] = state
        pool.version += 1
        self.on_change(pool.body["name"], state)

    # --- requests -----------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Any, body: bytes) -> _Answer:
        """What ARM answers."""
        if headers.get("Authorization") != f"Bearer {self.token}":
            message = "The access token is missing or invalid."
            raise Refused(401, "InvalidAuthenticationToken", message, flat=False)
        action = _action(method, path)
        if self.allowed is not None and action and action not in self.allowed:
            message = (
                f"The client '{CLIENT}' with object id '{CLIENT}' does not have authorization to perform action "
                f"'{action}' over scope '{path}' or the scope is invalid. If access was recently granted, please "
                "refresh your credentials."
            )
            raise Refused(403, "AuthorizationFailed", message, flat=False)
        self.settle()
        if path == _CLUSTER_ID and method == "GET":
            return 200, self._cluster(), {}
        if path == _POOLS and method == "GET":
            return self._paged([self._told(name) for name in sorted(self.pools)], path, query)
        if path.startswith(_POOLS + "/"):
            name, _, action = path.removeprefix(_POOLS + "/").partition("/")
            if method == "DELETE":
                self.queries.append(query)
            return self._pool_request(method, name, action, headers, body)
        if path.startswith(_OPERATIONS + "/"):
            return 200, self.operations[path.rpartition("/")[2]], {}
        if path == _COMPUTE + "/skus":
            assert query.get("$filter", "") in (f"location eq '{REGION}'", ""), query
            disk = {"resourceType": "disks", "name": "Premium_LRS", "locations": [REGION]}
            return self._paged([disk, *self.sizes.values()], path, query)
        if path == f"{_COMPUTE}/locations/{REGION}/usages":
            return self._paged([_usage(name, *numbers) for name, numbers in self.usages.items()], path, query)
        if path.lower().startswith(f"/subscriptions/{SUBSCRIPTION}/resourcegroups/{GROUP}/"):
            what = path.partition("/providers/")[2].partition("/agentPools")[0]
            message = f"The Resource '{what}' under resource group '{GROUP}' was not found."
            raise Refused(404, "ResourceNotFound", message, flat=False)
        raise Refused(404, "ResourceGroupNotFound", "Resource group could not be found.", flat=False)

    def _pool_request(self, method: str, name: str, action: str, headers: Any, body: bytes) -> _Answer:
        pool = self.pools.get(name)
        if method == "GET":
            if pool is None:
                raise Refused(404, "NotFound", f"Could not find the agentpool: {name} in cluster {CLUSTER}.")
            return 200, self._told(name), {}
        if method == "POST" and action == "abort" and pool is not None:
            if not pool.operation:
                raise Refused(409, "OperationNotAllowed", "There is no operation to abort.")
            return 202, None, self._begin(pool, "Canceling", "Canceled", self.abort_seconds)
        if self.busy_first:
            self._keep_waiting(name)
        if pool is not None or method == "PUT":
            self._hold_condition(pool, headers)
        self._keep_waiting(name)
        if method == "DELETE":
            return (
                (204, None, {})
                if pool is None
                else (202, None, self._begin(pool, "Deleting", "Gone", self.delete_seconds))
            )
        assert method == "PUT", method
        asked = self._valid(name, body)
        if pool is None:
            self._quota(asked)
            self.pools[name] = pool = _Pool(self._as_kept(name, asked))
            pool.failure = self.failures.pop(0) if self.failures else None
            started = self._begin(pool, "Creating", "Succeeded", self.boot_seconds)
            return 201, self._told(name), started
        if asked["vmSize"] != pool.body["properties"]["vmSize"]:
            raise Refused(400, "PropertyChangeNotAllowed", "Changing property 'properties.vmSize' is not allowed.")
        kept = {key: pool.body["properties"][key] for key in READ_ONLY if key in pool.body["properties"]}
        pool.body = self._as_kept(name, {**asked, **kept})
        pool.failure = None
        started = self._begin(pool, "Updating", "Succeeded", self.update_seconds)
        return 200, self._told(name), started

    def _hold_condition(self, pool: _Pool | None, headers: Any) -> None:
        match, none_match = headers.get("If-Match"), headers.get("If-None-Match")
        there = f'"{pool.version}"' if pool is not None else ""
        if (none_match == "*" and pool is not None) or (match and match != there):
            raise Refused(412, "PreconditionFailed", "The condition of the request's ETag is not met.")

    def _keep_waiting(self, name: str) -> None:
        for other, pool in self.pools.items():
            if pool.operation and (other == name or self.one_at_a_time):
                state = pool.body["properties"]["provisioningState"]
                message = (
                    f"Operation is not allowed: Another agentpool operation ({other} - {state}) is in progress, please "
                    "wait for it to finish before starting a new operation. See https://aka.ms/aks-pending-operation"
                )
                raise Refused(409, "OperationNotAllowed", message)

    def _valid(self, name: str, body: bytes) -> Body:
        """The properties that are asked for, if AKS would take them."""
        try:
            asked = AGENT_POOL.validate_json(body)
        except ValidationError as exc:
            raise Refused(400, "InvalidRequestContent", str(exc), flat=False) from exc
        self.bodies.append(asked)
        properties: Body = asked["properties"]
        wrong = sorted(READ_ONLY & set(properties)) or sorted({"id", "name", "type"} & set(asked))
        if wrong:
            raise Refused(400, "InvalidParameter", f"read-only: {', '.join(wrong)}")
        if "nodeImageVersion" in properties:
            raise Refused(400, "InvalidParameter", "a rollback to an image that is not among recentlyUsedVersions")
        if not re.fullmatch(r"[a-z][a-z0-9]{0,11}", name):
            raise Refused(400, "InvalidParameter", "The agent pool's name is not valid.")
        for key, value in properties.get("nodeLabels", {}).items():
            domain = key.rpartition("/")[0]
            if key != _SPOT and re.search(r"(^|\.)(kubernetes\.io|k8s\.io|kubernetes\.azure\.com)$", domain):
                raise Refused(400, "InvalidParameter", f"The label {key} has a reserved prefix.")
            if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", value):
                raise Refused(400, "InvalidParameter", f"The label {key} has a value that is not valid.")
        for key, value in properties.get("tags", {}).items():
            if len(key) > 512 or len(value) > 256 or re.search(r"[<>%&\\?/]", key):
                raise Refused(400, "InvalidParameter", f"The tag {key} is not valid.")
        if properties.get("scaleSetPriority") != "Spot" and "spotMaxPrice" in properties:
            raise Refused(400, "InvalidParameter", "spotMaxPrice is for Spot alone.")
        return properties

    def _quota(self, asked: Body) -> None:
        size = self.sizes.get(asked["vmSize"])
        if size is None:
            message = f"The VM size of {asked['vmSize']} is not allowed in your subscription in location '{REGION}'."
            raise Refused(400, "BadRequest", message)
        cores = int(size["capabilities"][0]["value"]) * asked["count"]
        for quota in _quotas(asked, size):
            used, limit = self.usages[quota]
            if used + cores > limit:
                message = (
                    f"Insufficient vcpu quota requested {cores}, remaining {limit - used} for family {quota} for "
                    f"region {REGION}."
                )
                raise Refused(400, "ErrCode_InsufficientVCPUQuota", message)
        self._use(asked, 1)

    def _use(self, properties: Body, sign: int) -> None:
        if size := self.sizes.get(properties["vmSize"]):
            for quota in _quotas(properties, size):
                self.usages[quota][0] += sign * int(size["capabilities"][0]["value"]) * properties["count"]

    # --- bodies -------------------------------------------------------------------------------------------------------

    def _as_kept(self, name: str, asked: Body) -> Body:
        """What AKS makes of what it was asked for: its defaults, and what a spot pool has besides."""
        properties: Body = {
            "osDiskSizeGB": 128,
            "osDiskType": "Managed",
            "kubeletDiskType": "OS",
            "maxPods": 110,
            "type": "VirtualMachineScaleSets",
            "enableAutoScaling": False,
            "orchestratorVersion": "1.34.2",
            "currentOrchestratorVersion": "1.34.2",
            "nodeImageVersion": "AKSUbuntu-2204gen2containerd-202611.07.0",
            "enableNodePublicIP": False,
            "osType": "Linux",
            "osSKU": "Ubuntu",
            "powerState": {"code": "Running"},
            "upgradeSettings": {"maxSurge": "10%"},
            "enableFIPS": False,
            **asked,
        }
        if asked.get("scaleSetPriority") == "Spot":
            properties["nodeLabels"] = {**asked.get("nodeLabels", {}), _SPOT: "spot"}
            properties["nodeTaints"] = sorted({*asked.get("nodeTaints", ()), f"{_SPOT}=spot:NoSchedule"})
        kind = "Microsoft.ContainerService/managedClusters/agentPools"
        return {"id": f"{_POOLS}/{name}", "name": name, "type": kind, "properties": properties}

    def _told(self, name: str) -> Body:
        pool = self.pools[name]
        properties = {**pool.body["properties"], "eTag": f'"{pool.version}"'}
        return _as_wired(AGENT_POOL, {**pool.body, "properties": properties})

    def _cluster(self) -> Body:
        properties = {"provisioningState": "Succeeded", "powerState": {"code": "Running"}}
        kind = "Microsoft.ContainerService/ManagedClusters"
        body = {"id": _CLUSTER_ID, "name": CLUSTER, "type": kind, "location": REGION, "properties": properties}
        return _as_wired(MANAGED_CLUSTER, body)

    def _paged(self, items: list[Body], path: str, query: Mapping[str, str]) -> _Answer:
        start = int(query.get("$skiptoken", "0"))
        end = start + self.page
        answer: Body = {"value": items[start:end]}
        if end < len(items):
            version = query["api-version"]
            answer["nextLink"] = f"https://{ARM_HOST}{path}?api-version={version}&%24skiptoken={end}"
        return 200, answer, {}


_Answer = tuple[int, Body | None, dict[str, str]]


def _action(method: str, path: str) -> str:
    """The action that a request needs a right to, as Azure names it."""
    verb = {"GET": "read", "PUT": "write", "DELETE": "delete"}.get(method, "abort/action")
    kinds = {_POOLS: "managedClusters/agentPools", _CLUSTER_ID: "managedClusters", _OPERATIONS: "locations/operations"}
    for start, kind in kinds.items():
        if path.startswith(start):
            return f"Microsoft.ContainerService/{kind}/{verb}"
    if path.startswith(_COMPUTE):
        kind = path.removeprefix(_COMPUTE + "/").replace(f"/{REGION}/", "/")
        return f"Microsoft.Compute/{kind}/{verb}"
    return ""


def _quotas(properties: Body, size: Body) -> tuple[str, ...]:
    return ("lowPriorityCores",) if properties.get("scaleSetPriority") == "Spot" else (size["family"], "cores")


def _usage(name: str, used: int, limit: int) -> Body:
    spoken = {"cores": "Total Regional vCPUs", "lowPriorityCores": "Total Regional Spot vCPUs"}
    named = {"value": name, "localizedValue": spoken.get(name, f"{name} vCPUs")}
    return {"unit": "Count", "currentValue": used, "limit": limit, "name": named}


def _written(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    standin = Azure(Path(sys.argv[1]))
    standin.start()
    ready = Path(sys.argv[1]) / "environment.json"
    ready.with_suffix(".part").write_text(json.dumps(standin.environment()))
    ready.with_suffix(".part").replace(ready)
    threading.Event().wait()
