"""The adapter's files and image: what PEFT and vLLM need, the tokenizer, the model card, and what was measured.

Nothing of the hour or the machine is in it: the same inputs give the same digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaito_flows import __version__
from kaito_flows.containers.tuner.job import TrainingConfig, TunerJob
from kaito_flows.errors import ImageError, disk_errors
from kaito_flows.oci.images import Content, Image, build_image, open_image, open_repository
from kaito_flows.oci.reference import ImageName

__all__ = ["IDENTITY", "METRICS", "AdapterFiles", "published", "write_and_publish"]

IDENTITY = "io.kaito-flows.identity"
WEIGHTS, CONFIG, METRICS, CARD = "adapter_model.safetensors", "adapter_config.json", "metrics.json", "README.md"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What PEFT reads: the bytes of `adapter_model.safetensors`, and what `adapter_config.json` says."""

    weights: bytes
    config: Mapping[str, Any]


def published(job: TunerJob) -> Image | None:
    """Return the whole image that this very job published before, if it did."""
    try:
        image = open_image(job.output)
    except ImageError:
        return None
    return image if image.annotations.get(IDENTITY) == job.identity and image.repository.has(image.digest) else None


def write_and_publish(
    job: TunerJob,
    config: TrainingConfig,
    adapter: AdapterFiles,
    metrics: Mapping[str, Any],
    facts: Mapping[str, Any],
    dataset_digest: str,
) -> Image:
    """Write the adapter into `results`, and its image under the job's output tag.

    Args:
        job: what is done for whom.
        config: how it was trained.
        adapter: the trained adapter.
        metrics: for `metrics.json`.
        facts: the dataset's `dataset.json`.
        dataset_digest: the dataset image's.

    Raises:
        DiskFullError: no space left.
        AccessError: (`push-refused`) the registry says no.
        RegistryError: the registry does not answer.
    """
    files = {
        WEIGHTS: adapter.weights,
        CONFIG: _json(adapter.config),
        METRICS: _json(metrics),
        CARD: model_card(job, config, metrics, facts).encode(),
    }
    with disk_errors(job.results):
        for name, content in files.items():
            _replace(job.results / name, content)
    inside: dict[str, Content] = {f"data/{name}": job.results / name for name in files}
    weights = {f"data/{WEIGHTS}": inside.pop(f"data/{WEIGHTS}")}
    tokenizer = {f"data/{n}": job.weights / n for n in TOKENIZER_FILES if (job.weights / n).is_file()}
    annotations = {
        "sh.kaito.model.name": job.model.preset,
        "org.opencontainers.image.title": job.workspace,
        "org.opencontainers.image.description": f"{_METHODS[job.method]} adapter for {job.model.id}",
        IDENTITY: job.identity,
        "io.kaito-flows.base-model": job.model.id,
        "io.kaito-flows.base-model-revision": job.model.revision,
        "io.kaito-flows.dataset": dataset_digest,
        "io.kaito-flows.method": job.method,
        "io.kaito-flows.tuner-version": __version__,
    }
    tag = ImageName.parse_image(job.output).reference
    layers = [weights, {**inside, **tokenizer}]
    return build_image(open_repository(job.output), layers, annotations=annotations, tag=tag)


_METHODS = {"lora": "LoRA", "qlora": "QLoRA"}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def model_card(job: TunerJob, config: TrainingConfig, metrics: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the model card, as the Hub reads it: front matter, what it is, how it was made, how to use it."""
    front = ["---", f"base_model: {json.dumps(job.model.id)}", "library_name: peft", "pipeline_tag: text-generation"]
    front += ["tags:", "- lora", *(["- qlora"] if job.method == "qlora" else []), "- kaito", "- kaito-flows", "---", ""]
    what = (
        f"A {_METHODS[job.method]} adapter for [{job.model.id}](https://huggingface.co/{job.model.id}), "
        f"trained by kaito-flows {__version__} on {facts['splits']['train']['documents']:,} chats."
    )
    return "\n".join([
        *front, f"# {job.workspace}", "", what, "",
        *_held_out(metrics), *_data(facts), *_settings(job, config, metrics), *_use(job),
    ])  # fmt: skip


def _held_out(metrics: Mapping[str, Any]) -> list[str]:
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    if not (before and after):
        return ["No data was held out: what the adapter is worth on new data was not measured.", ""]
    return [
        f"## Held-out data ({after['tokens']:,} tokens)", "",
        "| | base model | with the adapter |", "|---|---:|---:|",
        f"| loss | {before['loss']:.4f} | {after['loss']:.4f} |",
        f"| perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} |", "",
    ]  # fmt: skip


def _data(facts: Mapping[str, Any]) -> list[str]:
    rows = [f"| {s.get('url', '')} | {s.get('rows', '')} | `{s['sha256']}` |" for s in facts.get("sources", ())]
    return ["## Data", "", "| source | rows | sha256 |", "|---|---:|---|", *rows, ""] if rows else []


def _settings(job: TunerJob, config: TrainingConfig, metrics: Mapping[str, Any]) -> list[str]:
    lora, arguments, bits = config.LoraConfig, config.TrainingArguments, config.QuantizationConfig
    training, adapter = metrics["training"], metrics["adapter"]
    kind = bits.bnb_4bit_quant_type.upper() + (", double quantisation" if bits.bnb_4bit_use_double_quant else "")
    variants = [name for name, used in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if used]
    rows = {
        "base model revision": f"`{job.model.revision}`",
        "base model in": f"4 bits ({kind})" if bits.load_in_4bit else config.ModelConfig.torch_dtype,
        "rank, alpha, dropout": f"{lora.r}, {lora.lora_alpha:g}, {lora.lora_dropout:g}",
        **({"variant": ", ".join(variants)} if variants else {}),
        "adapted": f"{', '.join(adapter['target_modules'])} ({adapter['modules_adapted']} modules)",
        "trained parameters": f"{adapter['parameters']:,}",
        "steps, epochs": f"{training['steps']:,}, {training['epochs']:g}",
        "rows a step, tokens a row": f"{arguments.rows_a_step}, {arguments.max_length}",
        "tokens read, learned": f"{training['tokens']:,}, {training['trained_tokens']:,}",
        "learning rate": f"{arguments.learning_rate:g}, {arguments.lr_scheduler_type}",
        "optimizer": f"AdamW, weight decay {arguments.weight_decay:g}, gradient norm to {arguments.max_grad_norm:g}",
        "seed": str(arguments.seed),
        "run identity": f"`{job.identity}`",
    }
    return ["## Training", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]


def _use(job: TunerJob) -> list[str]:
    return [
        "## Use", "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{job.model.id}", dtype="auto")',
        'model = PeftModel.from_pretrained(base, "data")  # the folder inside this image',
        'tokenizer = AutoTokenizer.from_pretrained("data")',
        "```", "",
    ]  # fmt: skip
