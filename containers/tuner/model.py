"""The base model, quantised where the method says so, with LoRA adapters on the layers that the config names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kaito_flows.containers.tuner.job import TrainingConfig
from kaito_flows.errors import ConfigError, UnprovenError, WeightsError

# On some CPUs bitsandbytes asks for a package with faster kernels; it is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

FLOOR_B = "lora_B"


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model with adapters: PEFT's wrapper, what it wraps, and the trainable parameters by name."""

    peft: Any
    modules: tuple[str, ...]
    parameters: dict[str, nn.Parameter]
    device: torch.device

    @property
    def base(self) -> Any:
        """The causal language model inside."""
        return self.peft.get_base_model()


def load_model(folder: Path, config: TrainingConfig) -> Any:
    """Load the base model in the config's type, 4-bit where it says so, onto the GPU if there is one.

    Raises:
        WeightsError: the folder holds no model in safetensors, or one that does not load.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        hint = "config.json and safetensors files are needed; pickles are not read"
        raise WeightsError("no model in safetensors", place="workspace/weights", hint=hint)
    bits, quantization = config.QuantizationConfig, None
    if bits.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=bits.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=getattr(torch, bits.bnb_4bit_compute_dtype),
            bnb_4bit_use_double_quant=bits.bnb_4bit_use_double_quant,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.ModelConfig.torch_dtype),
            attn_implementation=config.ModelConfig.attn_implementation,
            quantization_config=quantization,
            device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
            local_files_only=True,
            use_safetensors=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as exc:
        if isinstance(exc, torch.OutOfMemoryError):
            raise
        raise WeightsError(f"cannot be loaded: {exc}", place="workspace/weights") from exc
    # Packed rows are told apart by their positions only while there is no cache.
    model.config.use_cache = False
    _use_plain_kernels(model)
    return model


def _use_plain_kernels(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit layers in evaluation, for a kernel that has no gradient.

    On CPUs with AVX512-BF16 one evaluation would make every later gradient silently wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def adapt(model: Any, model_id: str, config: TrainingConfig) -> Adapted:
    """Freeze the base and put LoRA adapters, in float32, on every module that a target names.

    Raises:
        ConfigError: a target names no module.
    """
    from peft import LoraConfig, get_peft_model

    lora, arguments = config.LoraConfig, config.TrainingArguments
    targets = sorted(set(lora.target_modules))
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in linear:
            raise ConfigError(
                f"target module {target!r} matches nothing",
                place="training_config.yaml: LoraConfig.target_modules",
                hint=f"the model's linear layers: {', '.join(sorted(linear - {'lm_head'}))}",
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(arguments.seed)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model_id,
    )
    peft = get_peft_model(model, settings, autocast_adapter_dtype=True)
    peft.peft_config["default"].base_model_name_or_path = model_id
    parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    modules = tuple(sorted({name.split(".lora_")[0] for name in parameters if f".{FLOOR_B}." in name}))
    device = next(iter(parameters.values())).device
    return Adapted(peft, modules, parameters, device)


def prove_adapted(adapted: Adapted, targets: list[str]) -> dict[str, Any]:
    """Prove that every target was adapted and that training moved each; return the facts.

    Raises:
        UnprovenError: a target without a module, or a B matrix that is still zero.
    """
    without = [t for t in targets if not any(m.rsplit(".", 1)[-1] == t for m in adapted.modules)]
    matrices = {name: p for name, p in adapted.parameters.items() if f".{FLOOR_B}." in name}
    zero = sorted(name for name, p in matrices.items() if not bool(p.detach().any()))
    if without or zero:
        first = f"target {without[0]!r} has no module" if without else f"{zero[0]} is still zero"
        hint = "the learning rate may be 0, or too few steps were made"
        raise UnprovenError(f"{len(zero)} of {len(matrices)} B matrices did not move: {first}", hint=hint)
    return {
        "target_modules": sorted(targets),
        "modules_adapted": len(adapted.modules),
        "parameters": sum(p.numel() for p in adapted.parameters.values()),
        "zero_b_matrices": 0,
    }
