"""The adapter's image: what PEFT and vLLM need, the tokenizer, the model card and what was measured.

Nothing of the hour or the machine is in it: the same inputs give the same digest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kaito_flows import __version__
from kaito_flows.containers.tuner.job import TrainingConfig, TunerJob
from kaito_flows.oci.images import Content, Image, build_image, open_image
from kaito_flows.oci.layout import Layout
from kaito_flows.oci.reference import LayoutReference

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
)


def publish(job: TunerJob, config: TrainingConfig, metrics: dict[str, Any], dataset: dict[str, Any]) -> Image:
    """Write the image from `results`, under the tag of the run."""
    tokenizer: dict[str, Content] = {
        f"data/{name}": job.weights / name for name in TOKENIZER_FILES if (job.weights / name).is_file()
    }
    small: dict[str, Content] = {
        "data/adapter_config.json": job.results / "adapter_config.json",
        "data/metrics.json": json.dumps(metrics, indent=1, sort_keys=True).encode(),
        "data/README.md": model_card(job, config, metrics, dataset).encode(),
        **tokenizer,
    }
    output = LayoutReference.parse(job.output)
    annotations = {
        "sh.kaito.model.name": job.model.preset,
        "org.opencontainers.image.title": job.workspace,
        "org.opencontainers.image.description": f"{job.method} adapter for {job.model.id}",
        "io.kaito-flows.identity": job.identity,
        "io.kaito-flows.dataset": open_image(job.dataset).digest,
        "io.kaito-flows.method": job.method,
        "io.kaito-flows.base-model": job.model.id,
        "io.kaito-flows.base-model-revision": job.model.revision,
        "io.kaito-flows.tuner-version": __version__,
    }
    weights: dict[str, Content] = {"data/adapter_model.safetensors": job.results / "adapter_model.safetensors"}
    return build_image(Layout(output.path), [weights, small], annotations=annotations, tag=output.tag)


def clean_config(path: Path, model_id: str) -> None:
    """Take the machine out of `adapter_config.json`: sorted keys and lists, the base by its id."""
    raw = json.loads(path.read_bytes())
    raw["base_model_name_or_path"] = model_id
    raw["target_modules"] = sorted(raw["target_modules"])
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def model_card(job: TunerJob, config: TrainingConfig, metrics: dict[str, Any], dataset: dict[str, Any]) -> str:
    """Write the model card that the Hub and people read."""
    lora, arguments = config.LoraConfig, config.TrainingArguments
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    training = metrics["training"]
    rows = {
        "method": job.method,
        "rank, alpha, dropout": f"{lora.r}, {lora.lora_alpha:g}, {lora.lora_dropout:g}",
        "target modules": ", ".join(sorted(lora.target_modules)),
        "learning rate": f"{arguments.learning_rate:g} ({arguments.lr_scheduler_type})",
        "steps, epochs": f"{training['steps']}, {training['epochs']:g}",
        "tokens seen, learned": f"{training['tokens']:,}, {training['trained_tokens']:,}",
        "sequence length": str(arguments.max_length),
        "seed": str(arguments.seed),
        "kaito-flows": __version__,
        "run identity": f"`{job.identity}`",
    }
    lines = ["---", f"base_model: {job.model.id}", "library_name: peft", "pipeline_tag: text-generation"]
    lines += ["tags:", "- lora", "- kaito", "- kaito-flows", "---", "", f"# {job.workspace}", ""]
    lines += [f"A LoRA adapter for [{job.model.id}](https://huggingface.co/{job.model.id}), made by kaito-flows.", ""]
    if before and after:
        lines += ["| held-out data | before | after |", "|---|---:|---:|"]
        lines += [f"| loss | {before['loss']:.4f} | {after['loss']:.4f} |"]
        lines += [f"| perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} |", ""]
    lines += ["## Training", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    lines += ["## Data", "", "| sha256 | rows |", "|---|---:|"]
    lines += [f"| `{source['sha256']}` | {source['rows']:,} |" for source in dataset.get("sources", [])]
    lines += ["", "## Use", "", "```python", "from peft import PeftModel"]
    lines += ["from transformers import AutoModelForCausalLM", ""]
    lines += [f'base = AutoModelForCausalLM.from_pretrained("{job.model.id}")']
    lines += ['model = PeftModel.from_pretrained(base, "data")  # the folder inside this image', "```", ""]
    return "\n".join(lines)
