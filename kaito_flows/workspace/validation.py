"""What a schema cannot say of a Workspace: KAITO's webhook rules, in its words, and a few better ones.

Rules read the raw document, not the model, so that a file with a wrong key still hears of everything else. Each rule is
a generator of faults; `RULES` lists them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from kaito_flows.errors import Fault, ImageError, PlanError
from kaito_flows.presets.loader import Preset, load_preset
from kaito_flows.reference import Reference
from kaito_flows.urls import public_url
from kaito_flows.workspace.spec import GPUS_ANNOTATION

Platform = Literal["local", "kubernetes"]
Document = Mapping[str, Any]

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(rf"{DNS_LABEL.pattern}(\.{DNS_LABEL.pattern})*")
STRENGTH = re.compile(r"0(\.[0-9]*)?|\.[0-9]+|1(\.0*)?|[0-9](\.[0-9]+)?[eE]-[1-9][0-9]*")
_PLACEHOLDER = re.compile(r"[{<]?[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_HERE[}>]?")
OWN_TAGS = ("run-", "dataset-", "data-", "checkpoint-")
"""How tags begin that kaito-flows writes into the output's repository."""
_METADATA_HOSTS = {"metadata.google.internal", "metadata.google", "instance-data.ec2.internal"}


def validate(document: Document, platform: Platform) -> list[Fault]:
    """Return every fault of a Workspace document that the schema alone does not see."""
    return [fault for rule in RULES for fault in rule(document, platform)]


def placeholders(document: Document) -> list[Fault]:
    """Return the places that still hold an example's `..._HERE`: harmless for a plan, refused before a run."""
    tuning, faults = _mapping(document, "tuning"), []
    values = {
        f"tuning.{section}.{key}": _mapping(tuning, section).get(key)
        for section, key in (("output", "image"), ("output", "imagePushSecret"), ("input", "image"))
    }
    for path, adapter in _adapters_of(document):
        values[f"{path}.source.image"] = _mapping(adapter, "source").get("image")
    for path, value in values.items():
        if isinstance(value, str) and (found := _PLACEHOLDER.findall(value)):
            message = f"still holds the placeholder {', '.join(found)}"
            faults.append(Fault(path, message, "write your own", code="placeholder"))
    return faults


def served_preset(document: Document) -> Preset | None:
    """Return the preset that an inference document serves, if there is one and it is known."""
    name = _mapping(_mapping(document, "inference"), "preset").get("name")
    try:
        return load_preset(name) if isinstance(name, str) else None
    except PlanError:
        return None  # told by `_preset`


def _name(document: Document, _: Platform) -> Iterator[Fault]:
    name = _mapping(document, "metadata").get("name")
    if isinstance(name, str) and (len(name) > 63 or not DNS_LABEL.fullmatch(name)):
        message = f"{name!r} is not a DNS-1123 label"
        yield Fault("metadata.name", message, "lowercase letters, digits and '-', at most 63 characters")


def _annotations(document: Document, _: Platform) -> Iterator[Fault]:
    gpus = _mapping(_mapping(document, "metadata"), "annotations").get(GPUS_ANNOTATION)
    if gpus is not None and not (isinstance(gpus, str) and re.fullmatch(r"[0-9]{1,2}", gpus)):
        path = f"metadata.annotations[{GPUS_ANNOTATION}]"
        yield Fault(path, f"{gpus!r} is not a number of GPUs", 'write one, as text: "1"; "0" runs on CPUs')


def _either_inference_or_tuning(document: Document, _: Platform) -> Iterator[Fault]:
    has = [key for key in ("inference", "tuning") if document.get(key) is not None]
    if not has:
        yield Fault("", "Either Inference or Tuning must be specified, not neither", "add `tuning:`")
    if len(has) == 2:
        yield Fault("", "Either Inference or Tuning must be specified, but not both", "split it into two Workspaces")


def _selector(document: Document, _: Platform) -> Iterator[Fault]:
    selector = _mapping(_mapping(document, "resource"), "labelSelector")
    for i, expression in enumerate(_sequence(selector, "matchExpressions")):
        if isinstance(expression, Mapping) and expression.get("operator") not in (None, "In"):
            path = f"resource.labelSelector.matchExpressions[{i}].operator"
            yield Fault(path, "Only allow matchLabels or 'IN' matchExpression")


def _nodes(document: Document, platform: Platform) -> Iterator[Fault]:
    resource = _mapping(document, "resource")
    count = resource.get("count", 1)
    several = isinstance(count, int) and count > 1
    if document.get("tuning") is not None:
        # KAITO tunes on one node only; in a cluster, we tune on several.
        if several and platform == "local":
            message = "Tuning does not currently support multinode configurations. Please set the node count to 1."
            yield Fault("resource.count", message)
        if resource.get("partition") is not None:
            yield Fault("resource.partition", "a partition is for inference only", "leave it out")
    elif several and _mapping(document, "inference").get("template") is None:
        message = f"{count} nodes, but one pod serves a preset, on one node"
        yield Fault("resource.count", message, "write 1; for more replicas, a Workspace each")


def _preset(document: Document, _: Platform) -> Iterator[Fault]:
    for section in ("tuning", "inference"):
        preset = _mapping(_mapping(document, section), "preset")
        path = f"{section}.preset.presetOptions.image"
        yield from _image(_mapping(preset, "presetOptions").get("image"), path)
        name = preset.get("name")
        if not isinstance(name, str):
            continue
        try:
            load_preset(name)
        except PlanError as exc:
            message = f"Unsupported {section} preset name {name}"
            yield Fault(f"{section}.preset.name", message, exc.hint, code=exc.code)


def _input(document: Document, platform: Platform) -> Iterator[Fault]:
    tuning = _mapping(document, "tuning")
    source = tuning.get("input")
    if not isinstance(source, Mapping):
        return
    if len(_given(source, "urls", "volumeSource", "image")) != 1:
        hint = "`volume` is read nowhere: KAITO's key is `volumeSource`" if "volume" in source else ""
        yield Fault("tuning.input", "Exactly one of URLs, Volume, or Image must be specified", hint)
    yield from _image(source.get("image"), "tuning.input.image")
    for i, url in enumerate(_sequence(source, "urls")):
        if isinstance(url, str) and (reason := _bad_url(url, platform)):
            yield Fault(f"tuning.input.urls[{i}]", reason[0], reason[1], code="invalid-url")


def _output(document: Document, platform: Platform) -> Iterator[Fault]:
    destination = _mapping(document, "tuning").get("output")
    if not isinstance(destination, Mapping):
        return
    given = _given(destination, "volumeSource", "image")
    if len(given) != 1:
        hint = "write `image: REGISTRY/REPOSITORY:TAG`"
        yield Fault("tuning.output", "Exactly one of Volume or Image must be specified", hint)
    yield from _image(destination.get("image"), "tuning.output.image")
    yield from _own_tag(destination.get("image"))
    # On this machine the image goes into a folder, and nothing has to be unlocked.
    if platform != "local" and "image" in given and not destination.get("imagePushSecret"):
        message = "Must specify imagePushSecret with destination image"
        yield Fault("tuning.output.imagePushSecret", message, code="missing-key")


def _inference(document: Document, _: Platform) -> Iterator[Fault]:
    inference = document.get("inference")
    if not isinstance(inference, Mapping):
        return
    if len(_given(inference, "preset", "template")) != 1:
        yield Fault("inference", "Exactly one of Preset or Template must be specified")
    elif inference.get("template"):
        for key in _given(inference, "config", "adapters"):
            yield Fault(f"inference.{key}", "is for a preset: a template says itself what it runs", "leave it out")


def _adapters(document: Document, _: Platform) -> Iterator[Fault]:
    # KAITO checks these at an update only, which lets a Workspace be created that it cannot serve.
    model = _served_name(document)
    seen: set[str] = set()
    for path, adapter in _adapters_of(document):
        source = adapter.get("source")
        if isinstance(source, Mapping):
            name = source.get("name")
            yield from _adapter_source(source, f"{path}.source")
            if isinstance(name, str) and name in seen:
                yield Fault(f"{path}.source.name", f"Duplicate adapter source name {name!r}", "each needs its own")
            if name and name == model:
                yield Fault(f"{path}.source.name", f"{name!r} is the base model's name", "requests choose by the name")
            seen |= {name} if isinstance(name, str) else set()
        strength = adapter.get("strength")
        if isinstance(strength, str) and not STRENGTH.fullmatch(strength):
            yield Fault(f"{path}.strength", f"{strength!r} is not a number from 0 to 1", 'write one, as text: "0.5"')


def _adapter_source(source: Document, path: str) -> Iterator[Fault]:
    name = source.get("name")
    if not name:
        yield Fault(f"{path}.name", "Name of Adapter must be specified", "requests choose the adapter by it")
    elif isinstance(name, str) and (len(name) > 253 or not DNS_SUBDOMAIN.fullmatch(name)):
        hint = "lowercase letters, digits, '-' and '.', at most 253 characters"
        yield Fault(f"{path}.name", f"{name!r} is not a DNS-1123 subdomain", hint)
    if source.get("urls"):
        yield Fault(f"{path}.urls", "URLs are not supported for adapters", "name an image or a volumeSource")
    if len(_given(source, "image", "volumeSource")) != 1:
        hint = "`volume` is read nowhere: KAITO's key is `volumeSource`" if "volume" in source else ""
        yield Fault(path, "Exactly one of Image or Volume must be specified for an adapter", hint)
    yield from _image(source.get("image"), f"{path}.image")


def _access_secret(document: Document, platform: Platform) -> Iterator[Fault]:
    options = _mapping(_mapping(_mapping(document, "inference"), "preset"), "presetOptions")
    preset, given = served_preset(document), bool(options.get("modelAccessSecret"))
    path = "inference.preset.presetOptions.modelAccessSecret"
    if preset is None:
        return
    if preset.gated and not given and platform != "local":
        message = "This preset requires a modelAccessSecret with HF_TOKEN key under presetOptions to download the model"
        old = document.get("apiVersion") == "kaito.sh/v1alpha1"
        yield Fault(path, message, "apiVersion kaito.sh/v1beta1 has the key" if old else "", code="missing-key")
    if preset.gated is False and given:
        message = "This preset does not require a modelAccessSecret with HF_TOKEN key under presetOptions"
        yield Fault(path, message, "leave it out")


def _served_name(document: Document) -> str:
    preset = served_preset(document)
    return preset.name if preset else ""


def _adapters_of(document: Document) -> Iterator[tuple[str, Document]]:
    for i, adapter in enumerate(_sequence(_mapping(document, "inference"), "adapters")):
        if isinstance(adapter, Mapping):
            yield f"inference.adapters[{i}]", adapter


RULES: tuple[Callable[[Document, Platform], Iterator[Fault]], ...] = (
    _name,
    _annotations,
    _either_inference_or_tuning,
    _selector,
    _nodes,
    _preset,
    _input,
    _output,
    _inference,
    _adapters,
    _access_secret,
)


def _mapping(parent: Document, key: str) -> Document:
    value = parent.get(key)
    return value if isinstance(value, Mapping) else {}


def _sequence(parent: Document, key: str) -> Sequence[Any]:
    value = parent.get(key)
    return value if isinstance(value, list) else []


def _given(parent: Document, *keys: str) -> list[str]:
    return [key for key in keys if parent.get(key)]


def _image(value: object, path: str) -> Iterator[Fault]:
    if not isinstance(value, str) or not value or _PLACEHOLDER.search(value):
        return
    try:
        Reference.parse(value)
    except ImageError as exc:
        yield Fault(path, exc.message, exc.hint, code=exc.code)


def _own_tag(value: object) -> Iterator[Fault]:
    try:
        reference = Reference.parse(value) if isinstance(value, str) else None
    except ImageError:
        return  # told by `_image`
    path = "tuning.output.image"
    if reference and reference.digest:
        yield Fault(path, "a digest cannot be written to", "name a tag", code="invalid-image")
    if reference and reference.tag.startswith(OWN_TAGS):
        message = f"the tag {reference.tag!r} is of those that kaito-flows gives itself"
        yield Fault(path, message, f"choose one that does not begin with {', '.join(OWN_TAGS)}")


def _bad_url(url: str, platform: Platform) -> tuple[str, str] | None:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
    except ValueError as exc:
        return f"{public_url(url)!r} is not a URL: {exc}", "write the whole URL"
    if parts.scheme == "file":
        if platform == "local":
            return None
        return "a file URL means nothing to a pod", "put the data behind https, into an image or on a volume"
    if parts.scheme not in ("http", "https"):
        return f"the scheme {parts.scheme!r} is not http or https", "write the whole URL"
    if not host:
        return f"{public_url(url)!r} names no host", "write the whole URL"
    if platform == "local":
        return None  # who runs this on their own machine may read what is on it
    if host == "localhost" or host.endswith(".localhost") or host in _METADATA_HOSTS:
        return f"the host {host!r} is not allowed", "pods fetch from public hosts only"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if not address.is_global:
        return f"the address {host} is loopback, private or link-local", "pods fetch from public hosts only"
    return None
