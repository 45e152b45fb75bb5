"""Roll out: a service with the new adapter, which must answer before the old one goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.chat import Message, ask
from kaito_flows.oci.images import Image, read_file
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import JobSpec, Platform, Service, ServiceSpec
from kaito_flows.tasks.progress import log, stage

SMOKE_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Answers:
    """One held-out prompt with what the data says, what the base model says, and what the tuned one says."""

    messages: tuple[Message, ...]
    expected: str
    base: str
    tuned: str


@task(name="roll-out", task_run_name="roll-out-{plan.workspace}", cache_policy=NO_CACHE)
def roll_out(
    plan: Plan, adapter: Image, dataset: Image, weights: Path, platform: Platform, port: int | None
) -> tuple[Service, Answers]:
    """Bring the service up, and ask the same prompt of the base model and of the tuned one."""
    with stage("roll out"):
        platform.check_known(plan.workspace)
        answers: list[Answers] = []

        def probe(service: Service) -> None:
            answers.append(_ask_both(service, plan.workspace, _sample(dataset)))

        quantization = plan.config["QuantizationConfig"]
        spec = JobSpec(
            name=f"serve-{plan.workspace}",
            workspace=plan.workspace,
            program="server",
            arguments={
                "version": 1,
                "workspace": plan.workspace,
                "model": plan.model,
                "torch_dtype": plan.config["ModelConfig"]["torch_dtype"],
                "quantization": quantization if quantization["load_in_4bit"] else None,
                "adapters": [{"name": plan.workspace, "image": adapter.reference}],
            },
            links={"workspace/weights": weights},
        )
        revision = adapter.digest.removeprefix("sha256:")[:12]
        service = platform.ensure_service(ServiceSpec(spec, revision, port), probe)
        log(f"serving at {service.url}{' (was up)' if service.adopted else ''}")
        return service, answers[-1]


def _sample(dataset: Image) -> dict[str, Any]:
    samples: list[dict[str, Any]] = json.loads(read_file(dataset, "data/samples.json"))
    return samples[0]


def _ask_both(service: Service, workspace: str, sample: dict[str, Any]) -> Answers:
    messages: Sequence[Message] = sample["messages"]
    base, tuned = (
        ask(service.url, model, messages, max_tokens=SMOKE_TOKENS) for model in (service.models[0], workspace)
    )
    if not tuned.strip():
        # The held-out loss is the proof; one empty answer is worth a word, and no failure.
        log(f"the tuned model answered {messages[-1]['content']!r} with nothing", warning=True)
    return Answers(tuple(messages), sample["answer"], base, tuned)
