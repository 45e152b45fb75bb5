"""The one gateway to Azure Resource Manager: a call answers, or raises an error of ours; answers tell the time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from azure.core import MatchConditions
from azure.core.exceptions import AzureError, ResourceExistsError, ResourceNotFoundError
from azure.core.pipeline import PipelineResponse
from azure.core.pipeline.policies import RetryPolicy
from azure.core.rest import HttpRequest, HttpResponse
from azure.identity import DefaultAzureCredential
from azure.mgmt.containerservice import ContainerServiceClient
from azure.mgmt.containerservice.models import AgentPool
from azure.mgmt.containerservice.models import AgentPoolManagedClusterAgentPoolProfileProperties as Properties

from kaito_flows.errors import CloudError, InputError, LeaseLostError
from kaito_flows.nodes.azure.errors import explained, of_answer
from kaito_flows.settings import Settings

# Of the SDK's own tries there are three by default, too few for a resource manager that throttles or restarts.
_TRIES: Final = 6
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
# Azure may ask for an hour's patience; a run is told instead of sleeping through it.
_LONGEST_WAIT: Final = 60.0


class _Retries(RetryPolicy[Any, Any]):
    """The SDK's own, which obeys any `Retry-After`: not beyond a minute, and not while another operation runs."""

    def is_retry(self, settings: dict[str, Any], response: PipelineResponse[Any, Any]) -> bool:
        waits = self.get_retry_after(response) or 0
        busy = response.http_response.status_code == 409
        return not busy and waits <= _LONGEST_WAIT and super().is_retry(settings, response)


class Arm:
    """The agent pools of one cluster, and what can be read beside them. Raises as `kaito_flows.nodes.pools.Cloud` says.

    ETags are Azure's: a pool has another after each change.
    """

    def __init__(self, client: ContainerServiceClient, subscription: str, group: str, cluster: str) -> None:
        self._client, self._subscription = client, subscription
        self._where = (group, cluster)
        self._told: tuple[datetime, float] | None = None
        self._operations: dict[str, str] = {}
        self._region = ""

    @classmethod
    def connect(cls, settings: Settings) -> Arm:
        """Open Azure as whom the surroundings say: workload identity, a managed identity, `az login`, …

        Nothing is asked for yet.

        Raises:
            InputError: (code `no-cloud`) the settings do not say which cluster.
        """
        needed = {
            "KAITO_FLOWS_AKS_SUBSCRIPTION": settings.aks_subscription,
            "KAITO_FLOWS_AKS_RESOURCE_GROUP": settings.aks_resource_group,
            "KAITO_FLOWS_AKS_CLUSTER": settings.aks_cluster,
        }
        if missing := [name for name, value in needed.items() if not value]:
            raise InputError(
                f"nodes are to come from AKS, and these are not set: {', '.join(missing)}",
                place="KAITO_FLOWS_NODES",
                hint="they say which cluster it is",
                code="no-cloud",
            )
        client = ContainerServiceClient(
            DefaultAzureCredential(),
            settings.aks_subscription,
            retry_policy=_Retries(retry_total=_TRIES, retry_status=_TRIES),
            connection_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
        )
        return cls(client, *needed.values())

    # --- agent pools --------------------------------------------------------------------------------------------------

    def list(self) -> list[AgentPool]:
        """All agent pools of the cluster."""
        with self._errors(""):
            return [
                _sound(found) for found in self._client.agent_pools.list(*self._where, raw_response_hook=self._hear)
            ]

    def get(self, name: str) -> AgentPool | None:
        """The agent pool; None if there is none of that name."""
        with self._errors(name):
            try:
                return _sound(self._client.agent_pools.get(*self._where, name, raw_response_hook=self._hear))
            except ResourceNotFoundError as exc:
                if self._is_elsewhere(exc):
                    raise
                return None

    def put(self, name: str, body: AgentPool, etag: str | None = None) -> AgentPool:
        """Ask for a new agent pool, or for a change of the one that has that ETag; what is asked for is not waited for.

        Raises:
            LeaseLostError: there is one already, or it has another ETag by now.
        """
        condition = MatchConditions.IfMissing if etag is None else MatchConditions.IfNotModified
        with self._errors(name):
            try:
                poller = self._client.agent_pools.begin_create_or_update(
                    *self._where,
                    name,
                    body,
                    etag="*" if etag is None else etag,
                    match_condition=condition,
                    polling=False,
                    raw_response_hook=lambda response: self._hear(response, name),
                )
                return _sound(poller.result())
            except ResourceNotFoundError as exc:
                if etag is None or self._is_elsewhere(exc):
                    raise
                raise LeaseLostError("somebody has removed the pool", place=name) from exc

    def delete(self, name: str, etag: str) -> None:
        """Ask for the agent pool with that ETag to be removed; one that is gone is no fault.

        Raises:
            LeaseLostError: it has another ETag by now.
        """
        with self._errors(name):
            try:
                self._client.agent_pools.begin_delete(
                    *self._where,
                    name,
                    etag=etag,
                    match_condition=MatchConditions.IfNotModified,
                    ignore_pod_disruption_budget=True,  # the node is the run's alone, and is paid for until it is gone
                    polling=False,
                    raw_response_hook=self._hear,
                )
            except ResourceNotFoundError as exc:
                if self._is_elsewhere(exc):
                    raise

    def abort(self, name: str) -> None:
        """Ask for what is being done to the agent pool to be given up; that it is done already is no fault."""
        with self._errors(name), suppress(ResourceExistsError, ResourceNotFoundError):
            self._client.agent_pools.begin_abort_latest_operation(
                *self._where, name, polling=False, raw_response_hook=self._hear
            )

    def failure(self, name: str) -> str:
        """Why the last operation that this process asked for has failed, in Azure's words; empty: not known."""
        if name not in self._operations:
            return ""
        try:
            error = self._ask(self._operations[name], {}).get("error") or {}
        except InputError:  # forgotten by now, or not ours to read
            return ""
        return ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))

    # --- beside them --------------------------------------------------------------------------------------------------

    def region(self) -> str:
        """The cluster's region: `eastus`."""
        if not self._region:
            with self._errors(""):
                cluster = self._client.managed_clusters.get(*self._where, raw_response_hook=self._hear)
                self._region = cluster.location.replace(" ", "").lower()
        return self._region

    def now(self) -> datetime:
        """The time by Azure's clock, from its last answer and this process's steady clock."""
        if self._told is None:
            self.list()
        if self._told is None:
            raise CloudError("Azure's answers do not tell the time: they have no header Date")
        time_then, heard = self._told
        return time_then + timedelta(seconds=time.monotonic() - heard)

    def read(self, path: str, version: str, **params: str) -> Iterator[Mapping[str, Any]]:
        """The items of a list below the subscription: `providers/Microsoft.Compute/…`, page by page."""
        url, query = f"/subscriptions/{self._subscription}/{path}", {"api-version": version, **params}
        while url:
            page = self._ask(url, query)
            items = page.get("value")
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise CloudError("Azure's answer has no list of objects in it", place=path)
            yield from items
            url, query = page.get("nextLink") or "", {}

    # --- errors and time ----------------------------------------------------------------------------------------------

    def _ask(self, url: str, query: Mapping[str, str]) -> Mapping[str, Any]:
        place = url.partition("?")[0].rpartition("/providers/")[2]
        with self._errors(place):
            request = HttpRequest("GET", url, params=dict(query))
            answer: HttpResponse = self._client.send_request(request, raw_response_hook=self._hear)
            body = answer.json()
        if not isinstance(body, dict):
            raise CloudError("Azure's answer is not an object", place=place)
        if answer.status_code != 200:
            error = body.get("error") or body
            code, message = str(error.get("code", "")), str(error.get("message", ""))
            raise of_answer(answer.status_code, code, f"{code}: {message}", place)
        return body

    def _is_elsewhere(self, exc: ResourceNotFoundError) -> bool:
        """Whether it is the cluster that is not there, and not only the pool."""
        return explained(exc, "").code == "no-cloud"

    @contextmanager
    def _errors(self, place: str) -> Iterator[None]:
        try:
            yield
        except AzureError as exc:
            raise explained(exc, place) from exc
        except (ValueError, TypeError, AttributeError, KeyError) as exc:  # no model of the SDK's can be made of it
            raise CloudError(f"Azure's answer makes no sense: {exc}", place=place) from exc

    def _hear(self, response: PipelineResponse[Any, Any], name: str = "") -> None:
        headers = response.http_response.headers
        if date := headers.get("Date"):
            self._told = parsedate_to_datetime(date).astimezone(UTC), time.monotonic()
        if name and (operation := headers.get("Azure-AsyncOperation")):
            self._operations[name] = operation


def _sound(found: AgentPool) -> AgentPool:
    """The agent pool, if it is one: the SDK takes what it gets."""
    properties = getattr(found, "properties", None)
    if not isinstance(properties, Properties) or not (found.name and properties.e_tag):
        raise TypeError("that is no agent pool")
    if not isinstance(properties.tags or {}, Mapping):
        raise TypeError("tags are a mapping")
    return found
