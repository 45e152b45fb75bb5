"""What trainings were seen to take of memory, for the plans of others like them: Prefect Variables, one for each kind.

    kaito_flows_memory_0f3a...  {"model": ..., "device": ..., "measured": [{"share": 0.81, "at": ..., ...}, ...]}

A run that comes again must find the plan that it had, or it might rent nodes of another size beside those that it has:
it is told what was known when it was made. So measurements are added, each higher than those before it; the last count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run as current_run
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.variables import Variable

from kaito_flows.planning.cost import rows_a_step
from kaito_flows.planning.memory import measured_share
from kaito_flows.planning.plan import Plan
from kaito_flows.tasks.progress import log

__all__ = ["keep_memory_share", "memory_share"]

_PREFIX = "kaito_flows_memory_"
_MARGIN = 0.01
_REMEMBERED = 20
_TERMINAL_SECONDS = 5.0


def memory_share(key: str) -> float | None:
    """Return what trainings of that `memory_key` took, as a share of what the formulas say; None: not known.

    In a flow run, what was known when it was made. A Prefect server that does not answer knows nothing; at a terminal
    it is asked once.
    """
    once = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _TERMINAL_SECONDS}
    try:
        with temporary_settings({} if current_run.id else once):
            until = _made_at()
            shares = [item["share"] for item in _measured(Variable.get(_PREFIX + key)) if item["at"] < until]
    except (httpx.HTTPError, PrefectException, OSError) as exc:
        log(f"what was measured before is not known: {exc}", warning=True)
        return None
    return max(shares, default=None)


def keep_memory_share(plan: Plan, timings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Remember what a training took that has ended, if it is more than what others like it did.

    After memory ran out, what had been seen was too little, and the formulas hold again.
    """
    if not _is_telling(plan, timings):
        return
    if any(entry["event"] in ("out-of-memory", "recompute-all") for entry in history):
        share: float | None = 1.0 if plan.memory.measured < 1.0 else None
    else:
        blocks = plan.preset.architecture.layers
        share = measured_share(
            plan.memory,
            host_bytes=timings["peak_host_bytes"],
            gpu_bytes=timings.get("peak_gpu_tensor_bytes"),
            kept_blocks=blocks - timings.get("blocks_recomputed", blocks),
        )
    if share is None:
        return
    name = _PREFIX + plan.memory_key
    try:
        before = _measured(Variable.get(name))
        if share <= max((item["share"] for item in before), default=0.0) + _MARGIN:
            return
        entry = {"share": round(share, 3), "at": _now(), "workspace": plan.workspace}
        measured = [*before[-_REMEMBERED:], entry]
        value = {"model": plan.preset.name, "method": plan.method, "device": plan.device, "measured": measured}
        Variable.set(name, value, overwrite=True)
    except (httpx.HTTPError, PrefectException, OSError, ValueError) as exc:
        log(f"what it took of memory is not remembered: {exc}", warning=True)


def _is_telling(plan: Plan, timings: Mapping[str, Any]) -> bool:
    """Whether the peak is that of any training of this kind.

    Not on one of many GPUs that divide a model; nor with rows that hold what they happen to, or fewer of them than go
    through at once; nor in a pod that has no GPU though the plan counts on one.
    """
    arguments = plan.config["TrainingArguments"]
    rows = plan.dataset.train_rows if plan.dataset else 0
    share = -(-min(rows, rows_a_step(plan.config)) // plan.processes)
    full = arguments["packing"] and share >= arguments["per_device_train_batch_size"]
    device = "peak_gpu_tensor_bytes" if plan.place.has_gpu else "peak_host_bytes"
    return bool(full and device in timings and not plan.shard)


def _measured(value: Any) -> list[dict[str, Any]]:
    """The measurements in a variable; people can edit it, so that what is none is left out."""
    found = value.get("measured") if isinstance(value, dict) else None
    return [
        item
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, dict) and isinstance(item.get("share"), float) and isinstance(item.get("at"), str)
    ]


def _made_at() -> str:
    if current_run.id is None:
        return _now()
    with get_client(sync_client=True) as client:
        made = client.read_flow_run(current_run.id).created
    return _text(made) if made else _now()


def _now() -> str:
    return _text(datetime.now(UTC))


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
