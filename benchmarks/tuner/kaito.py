"""`python -m benchmarks.tuner.kaito TRIAL.json`: a training as KAITO's program sets it up.

KAITO's `presets/workspace/tuning/text-generation/fine_tuning.py` (v0.12.0), told anew: the model in 4 bits, made ready
by PEFT's `prepare_model_for_kbit_training` (all else in float32, activations recomputed), one chat at a time without
packing, a plain language-modelling collator (all tokens are learned, but those that look like padding), the CUDA cache
emptied after each step, nothing saved but the adapter.

Not as KAITO has it, for the protocol wants it of all: r 16 on all linear layers of Phi-3 (KAITO's own names match two
of the four), optimizer steps of many chats and not of one, and the loss told at each.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.tuner.material import LINEAR
from benchmarks.tuner.trial import SEED, Trial
from kaito_flows.containers.program import emit, run


def main(trial: Trial) -> dict[str, Any]:
    """Train, and save the adapter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForLanguageModeling,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    from benchmarks.tuner.counting import counted, gpu_memory

    class EmptyCache(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.empty_cache()

    dtype = getattr(torch, trial.dtype)
    tokenizer = AutoTokenizer.from_pretrained(trial.weights)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        trial.weights,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
    )
    model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=trial.r, lora_alpha=trial.r, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    trainer = counted(SFTTrainer)(
        model=model,
        args=SFTConfig(
            output_dir=str(trial.folder / "results"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=max(1, round(trial.tokens_a_step / trial.mean_length)),
            max_steps=trial.steps,
            max_length=trial.length,
            learning_rate=trial.learning_rate,
            lr_scheduler_type="constant",
            bf16=trial.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            ddp_find_unused_parameters=False,
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=load_dataset("json", data_files=str(trial.chats), split="train").shuffle(),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[EmptyCache()],
    )
    trainer.train()
    model.save_pretrained(trial.folder / "results")
    emit("memory", **gpu_memory())
    return {"attention": model.config._attn_implementation}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(main, Trial, sys.argv)
