"""The base model, in 4 bits where the method says so, with LoRA adapters on the layers that the config names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from kaito_flows.containers.tuner.image import AdapterFiles
from kaito_flows.containers.tuner.isolation import Isolation, choose_isolation
from kaito_flows.containers.tuner.job import CONFIG_NAME, LoraConfig, QuantizationConfig, TrainingConfig
from kaito_flows.containers.tuner.memory import is_out_of_memory
from kaito_flows.containers.tuner.world import ALONE
from kaito_flows.errors import ConfigError, UnprovenError, WeightsError

__all__ = ["Adapted", "adapt", "adapter_files", "context_length", "load_base", "prove"]

# The libraries' own annotations are partial; what is called here is untyped.
_AutoConfig: Any = AutoConfig
_AutoModel: Any = AutoModelForCausalLM
_BitsAndBytes: Any = BitsAndBytesConfig


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model with adapters.

    `model` is the causal language model with the adapters in it, `peft` is PEFT's wrapper of it, `parameters` are those
    that are trained (float32), by name, `matched` are the modules that each target found, and `isolation` says how
    documents in one row are kept apart. When it is `sharded`, each process holds a part of the base.
    `best` is what the parameters were at the best evaluation, on the host, where that is to be known.
    """

    model: Any
    peft: Any
    parameters: dict[str, nn.Parameter]
    matched: dict[str, tuple[str, ...]]
    isolation: Isolation
    device: torch.device
    sharded: bool = False
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether the model takes all documents of a batch in one row."""
        return self.isolation == "documents"

    @property
    def masked(self) -> bool:
        """Whether the model must be given a mask."""
        return self.isolation == "mask"

    def keep_as_best(self) -> None:
        """Remember the parameters as they are now."""
        self.best.update({name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()})

    @torch.no_grad()
    def return_to_best(self) -> None:
        """Make the parameters what was remembered last, if something was."""
        for name, tensor in self.best.items():
            self.parameters[name].copy_(tensor)


def load_base(folder: Path, config: TrainingConfig, device: str | None = None) -> Any:
    """Load the base model in the config's type onto the device: by default the GPU, or the CPU when there is none.

    Raises:
        WeightsError: (code `weights-unreadable`) it does not load, or lacks tensors.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
    device = device or str(ALONE.device)
    try:
        settings = _AutoConfig.from_pretrained(folder, local_files_only=True)
        model, report = _AutoModel.from_pretrained(
            folder,
            dtype=getattr(torch, config.ModelConfig.torch_dtype),
            quantization_config=_quantization(config.QuantizationConfig),
            attn_implementation=_attention(settings, config.ModelConfig.attn_implementation),
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as exc:
        if is_out_of_memory(exc):
            raise
        said = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise WeightsError(f"cannot be loaded: {said}", place=str(folder), code="weights-unreadable") from exc
    if missing := sorted(report["missing_keys"]):
        message = f"{len(missing)} tensors are missing, {missing[0]} first"
        raise WeightsError(message, place=str(folder), code="weights-unreadable")
    # With a cache, documents in one row would see each other.
    model.config.use_cache = False
    _keep_plain_kernels(model)
    return model


def _quantization(section: QuantizationConfig) -> Any:
    if not section.load_in_4bit:
        return None
    return _BitsAndBytes(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=getattr(torch, section.bnb_4bit_compute_dtype),
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
    )


def _attention(settings: Any, wished: str) -> str:
    # Gemma 2 caps its attention scores, which only the eager implementation does.
    caps = getattr(settings.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if caps else wished


def _keep_plain_kernels(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit layers for a fused CPU kernel, which has no gradient.

    bitsandbytes 0.50.2 does so in place at the first evaluation, on CPUs with AVX512-BF16: from then on gradients are
    wrong, and layers of some sizes fail.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def context_length(model: Any) -> int | None:
    """Return how many tokens the model can take in at once, where it says so."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context


def adapt(model: Any, model_id: str, config: TrainingConfig) -> Adapted:
    """Freeze the base, and put LoRA adapters in float32 on every linear layer that a target names.

    Raises:
        ConfigError: a target names no linear layer.
        WeightsError: (code `weights-unsupported`) the model cannot keep documents in one row apart.
    """
    lora = config.LoraConfig
    matched = {target: _matches(model, target) for target in sorted(set(lora.target_modules))}
    isolation = choose_isolation(model, model_id)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.TrainingArguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # PEFT draws the A matrices.
    torch.manual_seed(config.TrainingArguments.seed)
    wrapper = peft.get_peft_model(model, _lora_settings(lora, sorted(matched)), autocast_adapter_dtype=True)
    # PEFT writes the folder that the weights came from.
    wrapper.peft_config["default"].base_model_name_or_path = model_id
    parameters = {name: p for name, p in wrapper.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return Adapted(
        wrapper.get_base_model(), wrapper, parameters, matched, isolation, next(iter(parameters.values())).device
    )


def _matches(model: nn.Module, target: str) -> tuple[str, ...]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = tuple(name for name in linear if name == target or name.endswith(f".{target}"))
    if not found:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear} - {"lm_head"})
        raise ConfigError(
            f"{target!r} matches no linear layer of the model",
            place=f"{CONFIG_NAME}: LoraConfig.target_modules",
            hint=f"the model has {', '.join(known)}",
        )
    return found


def _lora_settings(lora: LoraConfig, targets: list[str]) -> peft.LoraConfig:
    # vLLM takes nothing but an integer; PEFT's annotation says so too, but it takes both.
    alpha: Any = int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )


def prove(adapted: Adapted) -> dict[str, Any]:
    """Prove that training changed every module that was to be adapted, and return the facts about the adapter.

    An adapter computes `x·Aᵀ·Bᵀ`, and B is zero at first: one that still is does nothing (Hu et al. 2021, section 4.1).

    Raises:
        UnprovenError: a module has no adapter, or its B is zero.
    """
    b_matrices = {name.split(".lora_B.")[0]: p for name, p in adapted.parameters.items() if ".lora_B." in name}
    modules = {name.removeprefix("base_model.model."): bool(p.detach().any()) for name, p in b_matrices.items()}
    wanted = sorted({name for names in adapted.matched.values() for name in names})
    if without := [name for name in wanted if name not in modules]:
        raise UnprovenError(f"{len(without)} modules have no adapter, {without[0]} first", place="adapter")
    if zero := [name for name in wanted if not modules[name]]:
        raise UnprovenError(
            f"{len(zero)} of {len(wanted)} modules are as they were: {zero[0]} has a B matrix of zeros",
            place="adapter",
            hint="a higher learning_rate, or more steps",
        )
    return {
        "target_modules": sorted(adapted.matched),
        "modules_adapted": len(wanted),
        "parameters": sum(p.numel() for p in adapted.parameters.values()),
        "zero_b_matrices": 0,
    }


def adapter_files(adapted: Adapted) -> AdapterFiles:
    """Return the adapter as PEFT, vLLM and others read it; the same adapter gives the same bytes."""
    tensors = peft.get_peft_model_state_dict(adapted.peft, save_embedding_layers=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw: dict[str, Any] = adapted.peft.peft_config["default"].to_dict()
    # PEFT keeps some lists as sets, which have no order.
    lists = {key: sorted(value) for key, value in raw.items() if isinstance(value, set)}
    config = {**raw, **lists, "inference_mode": True}
    return AdapterFiles(safetensors.torch.save(plain, metadata={"format": "pt"}), config)
