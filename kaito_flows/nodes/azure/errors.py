"""What Azure's errors mean: another size, a wait, a right that is missing, or the end.

The codes and texts are those that Azure Resource Manager, the compute provider and AKS are known to send; AKS wraps the
compute provider's in its own, code and all, so that codes are looked for in the whole text.
"""

from __future__ import annotations

import re
from typing import Final

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    DecodeError,
    HttpResponseError,
    ODataV4Format,
)
from azure.mgmt.containerservice.models import ErrorDetail

from kaito_flows.errors import AccessError, CapacityError, CloudError, InputError, KaitoFlowsError, LeaseLostError

BUSY: Final = "cloud-busy"
"""The code of the `CloudError` that says: not now, another operation runs."""
QUOTAS: Final = "https://portal.azure.com/#view/Microsoft_Azure_Capacity/QuotaMenuBlade/~/myQuotas"
"""Where more quota is asked for."""

_CAPACITY: Final = (
    ("no-quota", re.compile(r"InsufficientVCPUQuota|QuotaExceeded|cores? quota|LowPriorityCores", re.IGNORECASE)),
    ("size-not-offered", re.compile(r"SkuNotAvailable|AvailabilityZoneNotSupported")),
    ("no-capacity", re.compile(r"(Zonal)?AllocationFailed|Overconstrained(Zonal)?AllocationRequest")),
)
_NOT_ALLOWED: Final = re.compile(r"VM size.* not (allowed|supported) in your subscription", re.IGNORECASE | re.DOTALL)
_IN_PROGRESS: Final = re.compile(r"in progress", re.IGNORECASE)
# "… has permission to perform action 'A' on …; however, it does not have permission to perform action 'B'": B.
_ACTION: Final = re.compile(r"not have (?:authorization|permission) to perform actions?(?:\(s\))? '([^']+)'", re.DOTALL)
_NO_CLUSTER: Final = (
    "ResourceGroupNotFound",
    "SubscriptionNotFound",
    "InvalidSubscriptionId",
    "ParentResourceNotFound",
)
_ROLE: Final = "docs/aks.md has the role that kaito-flows needs"
_IDENTITY: Final = "in a cluster: workload identity, as docs/aks.md sets it up; elsewhere: az login"
_WHICH: Final = "KAITO_FLOWS_AKS_SUBSCRIPTION, _RESOURCE_GROUP and _CLUSTER say which cluster"
_LONGEST = 700


def capacity_code(text: str) -> str:
    """The code of the `CapacityError` for an error of Azure's, by its code and message; empty for any other error."""
    return next((code for code, pattern in _CAPACITY if pattern.search(text)), "")


def said(error: ErrorDetail | ODataV4Format | None) -> str:
    """An error's code and message, and those of its details."""
    if error is None:
        return ""
    own = ": ".join(part for part in (error.code, error.message) if part)
    return "; ".join(dict.fromkeys(part for part in (own, *map(said, error.details or ())) if part))


def shortened(text: str) -> str:
    """The text in one line that a screen can hold."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " …"


def explained(exc: AzureError, place: str) -> KaitoFlowsError:
    """Return what an error of the SDK's is here; `LeaseLostError` where an ETag no longer holds."""
    if isinstance(exc, ClientAuthenticationError):
        return AccessError(f"Azure does not know who asks: {shortened(_text(exc))}", place=place, hint=_IDENTITY)
    if isinstance(exc, DecodeError) or not isinstance(exc, HttpResponseError):
        return CloudError(f"Azure does not answer as it should: {shortened(str(exc.message))}", place=place)
    return of_answer(exc.status_code or 0, _code(exc), _text(exc), place)


def of_answer(status: int, code: str, text: str, place: str) -> KaitoFlowsError:
    """Return the error that an answer of Azure's is: its HTTP status, its code, and the text that has both."""
    line = shortened(text)
    if status == 412:
        return LeaseLostError("somebody has made, changed or removed the pool", place=place)
    if status == 401:
        return AccessError(f"Azure does not know who asks: {line}", place=place, hint=_IDENTITY)
    if status == 403:
        action = _ACTION.search(text)
        what = f"the right {action[1]} is missing: {line}" if action else line
        return AccessError(what, place=place, hint=_ROLE)
    if status in (408, 429) or status >= 500 or status < 400:
        return CloudError(f"Azure does not answer as it should: {status} {line}", place=place)
    if short := capacity_code(text):
        return CapacityError(line, place=place, hint=f"quota: {QUOTAS}" if short == "no-quota" else "", code=short)
    if status == 409 and _IN_PROGRESS.search(text):
        return CloudError(line, place=place, hint="it is tried again", code=BUSY)
    if _NOT_ALLOWED.search(text):
        hint = "another size, or a request to Azure's support for this one"
        return CapacityError(line, place=place, hint=hint, code="size-not-allowed")
    if code in _NO_CLUSTER or (status == 404 and "managedClusters" in text and "agentPools" not in text):
        return InputError(line, place=place, hint=_WHICH, code="no-cloud")
    if status == 409:  # a cluster that is stopped, or being upgraded
        return CloudError(line, place=place)
    return InputError(line, place=place, code="refused-by-cloud")


def _code(exc: HttpResponseError) -> str:
    return str(getattr(exc.error, "code", "") or "")


def _text(exc: AzureError) -> str:
    return (said(exc.error) if isinstance(exc, HttpResponseError) else "") or str(exc.message)
