"""Roll out: a service that must answer before the old one goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.canonical import canonical_digest
from kaito_flows.chat import Message, ask
from kaito_flows.nodes import NodeLease
from kaito_flows.oci.images import Image, read_file
from kaito_flows.planning.plan import Plan
from kaito_flows.planning.serving import ServingPlan
from kaito_flows.platforms import JobSpec, Placement, Platform, Service, ServiceSpec
from kaito_flows.reference import Reference
from kaito_flows.tasks.progress import log, relay, stage
from kaito_flows.tasks.provision_nodes import Tenancy
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.tasks.storage import push_secrets
from kaito_flows.tasks.weights import weights_of
from kaito_flows.workspace import Workspace, WorkspaceFile
from kaito_flows.workspace.spec import LOAD_BALANCER_ANNOTATION

SMOKE_TOKENS = 48
SMOKE_PROMPT: Message = {"role": "user", "content": "Say hello."}


@dataclass(frozen=True, slots=True)
class Answers:
    """One held-out prompt with what the data says, what the base model says, and what the tuned one says."""

    messages: tuple[Message, ...]
    expected: str
    base: str
    tuned: str


@task(
    name="roll-out",
    task_run_name="roll-out-{plan.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def roll_out(
    plan: Plan,
    adapter: Image,
    dataset: Image,
    tenancy: Tenancy,
    workspace: Workspace,
    platform: Platform,
    port: int | None,
) -> tuple[Service, Answers]:
    """Bring the tuned model up, ask the same prompt of the base model and of the tuned one, and leave it its nodes."""
    with stage("roll out"):
        platform.check_known(plan.workspace)
        answers: list[Answers] = []

        def probe(service: Service, http: httpx.Client) -> None:
            answers.append(_ask_both(http, service.models[0], plan.workspace, _sample(dataset)))

        quantization = plan.config["QuantizationConfig"]
        revision = adapter.digest.removeprefix("sha256:")[:12]
        spec = JobSpec(
            name=f"{plan.workspace}-{revision}",
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
            weights=weights_of(plan, workspace),
            placement=Placement(gpus=min(tenancy.request.gpus, 1)),
            secrets=push_secrets(workspace),
        )
        wanted = ServiceSpec(spec, revision, port, public=_is_public(workspace))
        service = _bring_up(wanted, tenancy, platform, probe)
        log(f"serving at {service.url}{' (was up)' if service.adopted else ''}")
        return service, answers[-1]


@task(
    name="roll-out",
    task_run_name="roll-out-{file.workspace.metadata.name}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def roll_out_inference(
    file: WorkspaceFile,
    plan: ServingPlan | None,
    tenancy: Tenancy,
    platform: Platform,
    on_lease: Callable[[NodeLease], None],
) -> Service:
    """Bring up what an inference Workspace names: a preset with its adapters, or its own pod template."""
    workspace = file.workspace
    inference = workspace.inference
    assert inference is not None
    with stage("roll out"):
        platform.check_known(workspace.name)
        if plan is None:
            revision = canonical_digest(inference.template)[:12]
            spec = JobSpec(f"{workspace.name}-{revision}", workspace.name, "server", {})
            own = ServiceSpec(spec, revision, public=_is_public(workspace), template=inference.template)
            return _bring_up(own, tenancy, platform, lambda service, http: None, on_lease)
        adapters, volumes, secrets = _adapters(workspace, platform)
        arguments = {
            "version": 1,
            "workspace": workspace.name,
            "model": plan.model,
            "torch_dtype": plan.dtype,
            "quantization": None,
            "adapters": adapters,
        }
        files = {"mnt/config/inference_config.yaml": plan.config_yaml}
        weights = weights_of(plan, workspace)
        shown = {"arguments": arguments, "files": files, "weights": dict(weights.source)}
        revision = canonical_digest(shown)[:12]
        job = JobSpec(
            name=f"{workspace.name}-{revision}",
            workspace=workspace.name,
            program="server",
            arguments=arguments,
            files=files,
            weights=weights,
            placement=Placement(gpus=tenancy.request.gpus),
            secrets=secrets,
            volumes=volumes,
        )

        def probe(service: Service, http: httpx.Client) -> None:
            for model in service.models:
                ask(http, model, [SMOKE_PROMPT], max_tokens=8)

        wanted = ServiceSpec(job, revision, public=_is_public(workspace))
        service = _bring_up(wanted, tenancy, platform, probe, on_lease)
        log(f"serving at {service.url}{' (was up)' if service.adopted else ''}")
        return service


def _bring_up(
    wanted: ServiceSpec,
    tenancy: Tenancy,
    platform: Platform,
    probe: Callable[[Service, httpx.Client], None],
    on_lease: Callable[[NodeLease], None] = lambda lease: None,
) -> Service:
    """Bring it up on the run's nodes and leave them to it; or leave it where it is up already."""
    if not platform.serves(wanted):
        lease = tenancy.lease()
        on_lease(lease)
        placement = replace(wanted.job.placement, nodes=lease.nodes)
        wanted = replace(wanted, job=replace(wanted.job, placement=placement))
    service = platform.ensure_service(wanted, probe, relay("roll out"))
    tenancy.hand_over(service)
    return service


def _adapters(
    workspace: Workspace, platform: Platform
) -> tuple[list[dict[str, Any]], dict[str, Mapping[str, Any]], tuple[str, ...]]:
    """The adapters as the server's job file has them, by digest; their volumes by path; and the Secrets for images."""
    assert workspace.inference is not None
    adapters: list[dict[str, Any]] = []
    volumes: dict[str, Mapping[str, Any]] = {}
    secrets: list[str] = []
    for adapter in workspace.inference.adapters:
        source, image = adapter.source, None
        if source.image:
            repository = platform.repository(source.image, source.image_pull_secrets)
            reference = Reference.parse(source.image)
            image = repository.reference(repository.resolve(reference.digest or reference.tag))
            secrets += source.image_pull_secrets
        else:
            volumes[f"/mnt/adapter/{source.name}"] = source.volume_source or {}
        adapters.append({"name": source.name, "image": image})
        if "strength" in adapter.model_fields_set:
            adapters[-1]["strength"] = float(adapter.strength)
    return adapters, volumes, tuple(dict.fromkeys(secrets))


def _is_public(workspace: Workspace) -> bool:
    return workspace.metadata.annotations.get(LOAD_BALANCER_ANNOTATION, "").lower() == "true"


def _sample(dataset: Image) -> dict[str, Any]:
    samples: list[dict[str, Any]] = json.loads(read_file(dataset, "data/samples.json"))
    return samples[0]


def _ask_both(http: httpx.Client, base_name: str, workspace: str, sample: dict[str, Any]) -> Answers:
    messages: Sequence[Message] = sample["messages"]
    base, tuned = (ask(http, model, messages, max_tokens=SMOKE_TOKENS) for model in (base_name, workspace))
    if not tuned.strip():
        # The held-out loss is the proof; one empty answer is worth a word, and no failure.
        log(f"the tuned model answered {messages[-1]['content']!r} with nothing", warning=True)
    return Answers(tuple(messages), sample["answer"], base, tuned)
