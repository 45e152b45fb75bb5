"""`python -m benchmarks.tuner.sft TRIAL.json`: TRL's SFTTrainer, set up as well as its documentation tells.

Answers alone are learned, as ours does. TRL computes the loss in chunks, without logits of all tokens, by itself since
1.16. The variants:

    packed     best fit decreasing and padding-free, as many rows at once as ours
    packed-1   the same with one row at once: without FlashAttention, the mask over all rows at once is what costs
    grouped    no packing; chats of like length go through the model together

On a GPU with `flash-attn` installed, attention is FlashAttention's, else PyTorch's (sdpa); the trial may name another.
With `liger-kernel`, its fused layers are taken.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

from benchmarks.tuner.material import LINEAR
from benchmarks.tuner.trial import SEED, Trial
from kaito_flows.containers.program import emit, run


def main(trial: Trial) -> dict[str, Any]:
    """Train, and save the adapter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from benchmarks.tuner.counting import counted, gpu_memory

    dtype = getattr(torch, trial.dtype)
    gpu = torch.cuda.is_available()
    liger = bool(gpu and find_spec("liger_kernel"))
    best = "flash_attention_2" if gpu and find_spec("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        trial.weights,
        dtype=dtype,
        attn_implementation=trial.attention or best,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
        device_map={"": "cuda" if gpu else "cpu"},
    )
    trainer = counted(SFTTrainer)(
        model=model,
        args=SFTConfig(
            output_dir=str(trial.folder / "results"),
            **batches(trial),
            max_steps=trial.steps,
            max_length=trial.length,
            assistant_only_loss=True,
            gradient_checkpointing=trial.recompute,
            learning_rate=trial.learning_rate,
            lr_scheduler_type="constant",
            bf16=trial.dtype == "bfloat16",
            use_cpu=not gpu,
            use_liger_kernel=liger,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=load_dataset("json", data_files=str(trial.chats), split="train"),
        processing_class=AutoTokenizer.from_pretrained(trial.weights),
        peft_config=LoraConfig(
            r=trial.r, lora_alpha=trial.r, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    emit("memory", **gpu_memory())
    return {"attention": model.config._attn_implementation, "liger": liger}


def batches(trial: Trial) -> dict[str, Any]:
    """How chats are put together, by variant."""
    if trial.variant == "grouped":
        at_once = max(1, round(trial.micro_tokens / trial.mean_length))
        steps = max(1, round(trial.tokens_a_step / (at_once * trial.mean_length)))
        return {
            "train_sampling_strategy": "group_by_length",
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": steps,
        }
    rows = 1 if trial.variant == "packed-1" else trial.rows
    return {
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": trial.rows * trial.micro_steps // rows,
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(main, Trial, sys.argv)
