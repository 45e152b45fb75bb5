"""The Workspace: KAITO's custom resource, both API versions, as files hold it and as people get it wrong."""

from kaito_flows.workspace.inference_config import InferenceConfig
from kaito_flows.workspace.loading import WorkspaceFile, load_workspace, parse_workspace
from kaito_flows.workspace.spec import Workspace, WorkspaceV1alpha1, WorkspaceV1beta1
from kaito_flows.workspace.training_config import TrainingConfig

__all__ = [
    "InferenceConfig",
    "TrainingConfig",
    "Workspace",
    "WorkspaceFile",
    "WorkspaceV1alpha1",
    "WorkspaceV1beta1",
    "load_workspace",
    "parse_workspace",
]
