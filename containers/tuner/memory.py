"""Telling "not enough memory" from other failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kaito_flows.containers.tuner.job import TrainingConfig
from kaito_flows.errors import OutOfMemoryError

__all__ = ["is_out_of_memory", "memory_errors"]

# What PyTorch's allocators for GPU and CPU, and the CUDA runtime, say. Not all of it has a class of its own.
_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether that exception says that memory is lacking."""
    return isinstance(exc, MemoryError) or (
        isinstance(exc, RuntimeError | OSError) and any(said in str(exc).lower() for said in _SAID)
    )


@contextmanager
def memory_errors(config: TrainingConfig) -> Iterator[None]:
    """Turn lack of memory inside the block into `OutOfMemoryError`, with the settings that matter."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as exc:
        if not is_out_of_memory(exc):
            raise
        arguments = config.TrainingArguments
        said = (str(exc).strip().splitlines() or ["no memory left"])[0]
        settings = (
            f"max_length {arguments.max_length}, per_device_train_batch_size {arguments.per_device_train_batch_size}, "
            f"gradient_checkpointing {str(arguments.gradient_checkpointing).lower()}"
        )
        hint = (
            "a smaller max_length or per_device_train_batch_size (with more gradient_accumulation_steps), "
            "gradient_checkpointing: true, or a GPU with more memory"
        )
        raise OutOfMemoryError(f"{said} With {settings}.", place="tuner", hint=hint) from exc
