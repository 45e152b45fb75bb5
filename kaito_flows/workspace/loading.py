"""From a YAML file with one or several documents to a valid Workspace and its resolved config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import yaml
from pydantic import ValidationError

from kaito_flows.errors import ConfigError, Fault, InputError, WorkspaceError
from kaito_flows.workspace.faults import faults_of, nearest
from kaito_flows.workspace.inference_config import INFERENCE_CONFIG_KEY, InferenceConfig
from kaito_flows.workspace.spec import Workspace, WorkspaceV1alpha1, WorkspaceV1beta1
from kaito_flows.workspace.training_config import CONFIG_KEY, TrainingConfig
from kaito_flows.workspace.validation import Platform, placeholders, served_preset, validate

T = TypeVar("T")

VERSIONS: dict[str, type[WorkspaceV1alpha1] | type[WorkspaceV1beta1]] = {
    "kaito.sh/v1alpha1": WorkspaceV1alpha1,
    "kaito.sh/v1beta1": WorkspaceV1beta1,
}


@dataclass(frozen=True, slots=True)
class WorkspaceFile:
    """A Workspace with what came with it: its resolved config, and what is still to be filled in.

    The training config is that of a tuning Workspace, the inference config that of one that serves a preset.
    `config_text` is what the user wrote, if they did.
    """

    workspace: Workspace
    training_config: TrainingConfig | None
    config_text: str | None
    placeholders: tuple[Fault, ...] = ()
    inference_config: InferenceConfig | None = None

    def as_parameters(self) -> dict[str, Any]:
        """The parameters with which the flow `tune-workspace`, or `serve-workspace`, runs this file."""
        workspace = self.workspace.model_dump(mode="json", by_alias=True, exclude_unset=True)
        key = "training_config" if self.workspace.tuning else "inference_config"
        return {"workspace": workspace, **({key: self.config_text} if self.config_text else {})}


def load_workspace(path: Path, platform: Platform) -> WorkspaceFile:
    """Read a Workspace from a file; a ConfigMap in the same file is found by the name that `config` gives.

    Raises:
        InputError: (codes `file-not-found`, `file-not-readable`, `invalid-yaml`) the file itself.
        WorkspaceError: every fault in it, each with its path.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as exc:
        raise InputError("no such file", place=str(path), hint="check the path", code="file-not-found") from exc
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        hint = "name a YAML file that you may read"
        raise InputError(f"cannot be read: {reason}", place=str(path), hint=hint, code="file-not-readable") from exc
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # a date that is none is a ValueError
        mark = getattr(exc, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(exc, "problem", None) or str(exc)
        raise InputError(problem, place=place, hint="mend the YAML", code="invalid-yaml") from exc
    workspaces = [d for d in documents if isinstance(d, dict) and d.get("kind") == "Workspace"]
    if len(workspaces) != 1:
        kinds = ", ".join(str(d.get("kind")) if isinstance(d, dict) else type(d).__name__ for d in documents)
        message = f"holds {len(workspaces)} Workspaces, not one (documents: {kinds or 'none'})"
        raise InputError(message, place=str(path), hint="one Workspace a file", code="invalid-yaml")
    _resolve_files(workspaces[0], path.absolute().parent)
    return parse_workspace(workspaces[0], platform, config_maps=documents, source=str(path))


def _resolve_files(document: dict[str, Any], folder: Path) -> None:
    """Make relative file URLs (`file:data/x.parquet`) absolute: they are relative to the Workspace's file."""
    source = (document.get("tuning") or {}).get("input") if isinstance(document.get("tuning"), dict) else None
    urls = source.get("urls") if isinstance(source, dict) else None
    if isinstance(urls, list):
        for i, url in enumerate(urls):
            if isinstance(url, str) and url.startswith("file:") and not url.startswith("file:/"):
                urls[i] = (folder / unquote(url.removeprefix("file:"))).resolve().as_uri()


def parse_workspace(
    document: Mapping[str, Any],
    platform: Platform,
    *,
    config_maps: Iterable[Any] = (),
    training_config: str | None = None,
    inference_config: str | None = None,
    source: str = "",
) -> WorkspaceFile:
    """Read a Workspace from a document, with its config as text or among `config_maps`.

    Raises:
        WorkspaceError: every fault in it, each with its path.
    """
    version = document.get("apiVersion")
    model = VERSIONS.get(str(version), WorkspaceV1beta1)
    faults: list[Fault] = []
    if version not in VERSIONS:
        like = nearest(str(version), VERSIONS) or "kaito.sh/v1beta1"
        faults.append(Fault("apiVersion", f"{version!r} is not known", f'write "{like}"', code="invalid-value"))
    workspace: Workspace | None = None
    try:
        workspace = model.model_validate(document)
    except ValidationError as exc:
        faults += [f for f in faults_of(exc, model) if f.path != "apiVersion"]
    structural = {f.path for f in faults}
    faults += [f for f in validate(document, platform) if f.path not in structural or not f.path]

    found = _Configs(tuple(config_maps))
    tuning = _section(document, "tuning")
    training, text = None, training_config
    method = str(tuning.get("method", "")).lower()
    if tuning:
        text, place = found.text(text, tuning, "tuning.config", CONFIG_KEY)
        if method in ("lora", "qlora"):
            training = found.attempt(lambda: TrainingConfig.resolve(method, text, place=place))
    inference, served = _section(document, "inference"), None
    if inference.get("preset"):
        text, place = found.text(inference_config, inference, "inference.config", INFERENCE_CONFIG_KEY)
        served = found.attempt(lambda: InferenceConfig.resolve(text, place=place))
        found.faults += _too_long(served, document, place)
    faults += found.faults
    if faults or workspace is None:
        raise WorkspaceError(faults, source=source)
    return WorkspaceFile(workspace, training, text, tuple(placeholders(document)), served)


class _Configs:
    """The ConfigMaps among the documents, and the faults that were found in looking for one and reading it."""

    def __init__(self, documents: Iterable[Any]) -> None:
        self.faults: list[Fault] = []
        self._documents = documents

    def text(self, given: str | None, section: Mapping[str, Any], path: str, key: str) -> tuple[str | None, str]:
        """The config's text, given or from the ConfigMap that the section names, and the place to name in faults."""
        name = section.get("config")
        if given is not None or not isinstance(name, str) or not name:
            return given, key
        text, fault = _config_text(name, path, key, self._documents)
        self.faults += [fault] if fault else []
        return text, f"ConfigMap/{name}"

    def attempt(self, resolve: Callable[[], T]) -> T | None:
        """What `resolve` returns, or None with its faults noted."""
        try:
            return resolve()
        except WorkspaceError as exc:
            self.faults += exc.faults
        except ConfigError as exc:
            self.faults.append(Fault(exc.place, exc.message, exc.hint, code=exc.code))
        return None


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = document.get(key)
    return section if isinstance(section, Mapping) else {}


def _too_long(config: InferenceConfig | None, document: Mapping[str, Any], place: str) -> Iterator[Fault]:
    preset = served_preset(document)
    if config is None or preset is None or config.max_model_len is None:
        return
    asked, longest = config.max_model_len, preset.architecture.context_length
    if asked > longest:
        message = f"{asked} tokens; {preset.name} reads {longest}"
        yield Fault(f"{place}: vllm.max-model-len", message, f"write {longest} or less", code="sequence-too-long")


def _config_text(name: str, path: str, key: str, documents: Iterable[Any]) -> tuple[str | None, Fault | None]:
    maps = {
        d.get("metadata", {}).get("name"): d.get("data") or {}
        for d in documents
        if isinstance(d, dict) and d.get("kind") == "ConfigMap" and isinstance(d.get("metadata"), dict)
        if isinstance(d["metadata"].get("name"), str)
    }
    if name not in maps:
        hint = f"ConfigMaps here: {', '.join(map(str, maps))}" if maps else "add it to the file as another document"
        return None, Fault(path, f"no ConfigMap {name!r} in the file", hint, code="config-map-not-found")
    text = maps[name].get(key) if isinstance(maps[name], dict) else None
    if not isinstance(text, str):
        message = f"ConfigMap {name!r} has no key {key!r}"
        return None, Fault(path, message, code="config-map-not-found")
    return text, None
