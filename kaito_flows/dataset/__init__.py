"""Datasets: from files on the web to rows of tokens in an image, on a CPU.

fetch the files  ->  read chats  ->  render and tokenise, with a mask over the answers  ->  split  ->  pack  ->  image
"""

from kaito_flows.dataset.download import Patience, SourceFile, fetch, probe
from kaito_flows.dataset.images import files_of_image
from kaito_flows.dataset.prepare import DatasetParameters, PreparedDataset, dataset_key, prepare_dataset
from kaito_flows.urls import public_url

__all__ = [
    "DatasetParameters",
    "Patience",
    "PreparedDataset",
    "SourceFile",
    "dataset_key",
    "fetch",
    "files_of_image",
    "prepare_dataset",
    "probe",
    "public_url",
]
