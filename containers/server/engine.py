"""The base model with its adapters in memory, and generation with them. Only encoding is for several threads at once.

The base is loaded as the tuner loads it (same quantization, same type, same attention), and adapters stay beside it,
unmerged, as they were trained: a served answer is what the tuned model says.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk; nothing may ask the Hub

import jinja2
import safetensors
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from kaito_flows.containers.server.inputs import ADAPTER_WEIGHTS
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.text import TextCollector
from kaito_flows.containers.server.worker import Answer, Order
from kaito_flows.errors import ImageError, OutOfMemoryError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Engine"]

# transformers' own annotations are partial; what is called here is untyped.
_Model: Any = AutoModelForCausalLM
_Quantization: Any = BitsAndBytesConfig
_Settings: Any = GenerationConfig

DEFAULT_CONTEXT = 2048
# Below this temperature an answer is greedy: logits divided by less overflow, and the best token wins anyway.
COLDEST = 0.01
# Ends of a turn in the chat templates of the models that are served; a model's own list often names only one.
TURN_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
# GenerationConfig knows these too, but they change what the server itself decides, need a second model, or code from
# the Hub.
SERVER_OWNED = frozenset({
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "num_return_sequences", "cache_implementation", "cache_config", "max_cache_len", "compile_config",
    "disable_compile", "continuous_batching_config", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "speculation_type", "use_mtp", "watermarking_config", "penalty_alpha", "dola_layers",
    "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids", "low_memory", "prefill_chunk_size",
    "token_healing", "guidance_scale", "decoder_start_token_id", "transformers_version", "sequence_bias",
    "stop_strings",
})  # fmt: skip
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TOKEN_OPTIONS = (
    "eos_token_id", "pad_token_id", "bos_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
)  # fmt: skip


class Engine:
    """A loaded model. `names` are the models it answers as: the base first, then the adapters."""

    def __init__(self, base_name: str, model: Any, tokenizers: tuple[Any, Any], defaults: Mapping[str, Any]) -> None:
        self.base_name = base_name
        self._base = model
        self._peft: PeftModel | None = None
        # Under each name, the adapters that are active at once: one, or those that are combined.
        self._adapters: dict[str, list[str]] = {}
        self._default = base_name
        self._encoder, self._decoder = tokenizers
        self._encoding = threading.Lock()
        config = model.config.get_text_config()
        self.context_length = int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        # What the model's makers chose for sampling; a request's own values go before.
        self.sampling_defaults = {key: defaults[key] for key in ("temperature", "top_k", "top_p") if defaults.get(key)}
        self.end_tokens = _end_tokens(self._encoder, defaults)
        pad = self._encoder.pad_token_id
        self._pad = pad if pad is not None else self.end_tokens[0]
        # generate() fills whatever an order leaves open from here: nothing may be hidden in it.
        self._base.generation_config = _Settings()
        self.generation_options = frozenset(_Settings().__dict__) - SERVER_OWNED - {"_from_model_config"}

    @classmethod
    def load(
        cls,
        weights: Path,
        *,
        name: str,
        torch_dtype: str,
        quantization: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
    ) -> Engine:
        """Load the base model and its tokenizer from a Hugging Face folder; `max_model_len` shortens its context.

        Raises:
            WeightsError: (code `weights-unreadable`) they cannot be read, or parts are missing.
            OutOfMemoryError: they do not fit.
        """
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
        with _memory_errors(str(weights)):
            try:
                model, report = _Model.from_pretrained(
                    weights,
                    dtype=getattr(torch, torch_dtype),
                    quantization_config=_quantization(quantization),
                    attn_implementation="sdpa",
                    device_map="auto" if torch.cuda.is_available() else {"": "cpu"},
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
                tokenizers = tuple(AutoTokenizer.from_pretrained(weights, local_files_only=True) for _ in range(2))
            except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as exc:
                raise WeightsError(_first_line(exc), place=str(weights), code="weights-unreadable") from exc
            except RuntimeError as exc:
                if _is_out_of_memory(exc):
                    raise
                raise WeightsError(_first_line(exc), place=str(weights), code="weights-unreadable") from exc
        if missing := sorted(report["missing_keys"]):
            raise WeightsError(
                f"{len(missing)} tensors are missing, {missing[0]} first", place=str(weights), code="weights-unreadable"
            )
        _keep_plain_kernels(model)
        model.eval()
        defaults_file = weights / "generation_config.json"
        defaults = json.loads(defaults_file.read_text(encoding="utf-8")) if defaults_file.is_file() else {}
        engine = cls(name, model, (tokenizers[0], tokenizers[1]), defaults)
        engine.context_length = min(engine.context_length, max_model_len or engine.context_length)
        return engine

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Put a LoRA adapter beside the base, under the name that requests give; `strength` scales what it adds.

        Raises:
            ImageError: (code `adapter-misfit`) it was made for another base; (code `adapter-unreadable`).
            OutOfMemoryError: it does not fit.
        """
        inner = f"adapter{len(self._adapters)}"  # PEFT takes no dots in names
        with _memory_errors(str(folder)):
            try:
                keys = _fitting_keys(self._base, folder / ADAPTER_WEIGHTS)
                config = PeftConfig.from_pretrained(str(folder))
                config.inference_mode = True
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._base, str(folder), adapter_name=inner, config=config)
                else:
                    self._peft.load_adapter(str(folder), adapter_name=inner)
                made = get_peft_model_state_dict(self._peft, adapter_name=inner, save_embedding_layers=False)
            except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as exc:
                raise ImageError(_first_line(exc), place=str(folder), code="adapter-unreadable") from exc
            except RuntimeError as exc:
                if _is_out_of_memory(exc):
                    raise
                raise ImageError(_first_line(exc), place=str(folder), code="adapter-misfit") from exc
        if missing := sorted(set(made) - keys):
            raise ImageError(
                f"the adapter's configuration names {len(missing)} tensors that it does not hold, {missing[0]} first",
                place=str(folder),
                code="adapter-unreadable",
            )
        if strength != 1:
            for module in self._peft.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale(inner, strength)
        self._peft.eval()
        if self._default == self.base_name:
            self._default = name
        self._adapters[name] = [inner]

    def combine(self, name: str, adapters: Sequence[str]) -> None:
        """Answer as `name` with these adapters at once: the base and the sum of what each adds, by its strength.

        It is the model of a request that names none, as in KAITO. KAITO's own sum goes through a singular value
        decomposition, which keeps the rank of the adapters and loses the rest; this one is exact.
        """
        self._adapters[name] = [inner for adapter in adapters for inner in self._adapters[adapter]]
        self._default = name

    @property
    def names(self) -> tuple[str, ...]:
        """The models it answers as: the base first."""
        return (self.base_name, *self._adapters)

    @property
    def default_name(self) -> str:
        """The model of a request that names none: the combined one, the first adapter, or the base."""
        return self._default

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a raw prompt, with those that the tokenizer puts around any text."""
        with self._encoding:
            return tuple(self._encoder(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The tokens of a conversation in the model's chat template, up to where the answer begins.

        Raises:
            Refusal: (400) there is no template, or it does not take these messages.
        """
        if not self._encoder.chat_template:
            raise Refusal(400, "this model has no chat template; send a prompt", code="no_chat_template")
        try:
            with self._encoding:
                text = self._encoder.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
                return tuple(self._encoder(text, add_special_tokens=False)["input_ids"])
        except jinja2.TemplateError as exc:
            message = f"the model's chat template does not take these messages: {exc}"
            raise Refusal(400, message, code="invalid_messages", param="messages") from exc

    def decode(self, tokens: Sequence[int], *, clean_up: bool = False) -> str:
        """The text of tokens, special ones left out."""
        with self._encoding:
            return _decode(self._encoder, tokens, clean_up=clean_up)

    def configure(self, options: Mapping[str, Any], *, max_new_tokens: int) -> Any:
        """Return transformers' settings for these `generate` options; what they leave open is greedy and plain.

        Raises:
            Refusal: (400) an option that cannot be had, or with a value that it does not take.
        """
        for key in options:
            if key not in self.generation_options:
                why = "is not the request's to set" if key in SERVER_OWNED else "is no option of text generation"
                raise Refusal(400, f"{key!r} {why}", code="unsupported_parameter", param=key)
        for key in _TOKEN_OPTIONS:
            for token in _integers(options.get(key)):
                if not 0 <= token < self.vocabulary:
                    message = f"{key}: {token} is no token of this model (0 to {self.vocabulary - 1})"
                    raise Refusal(400, message, code="invalid_value", param=key)
        given = {key: value for key, value in options.items() if value is not None}
        sampling = given.get("do_sample", False) and given.get("temperature", 1.0) >= COLDEST
        plain: dict[str, Any] = {"pad_token_id": self._pad, "eos_token_id": list(self.end_tokens), "use_cache": True}
        plain["remove_invalid_values"] = True  # a NaN in sampling kills a CUDA process for good
        if sampling:
            plain |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        else:
            given = {key: value for key, value in given.items() if key not in SAMPLING_ONLY}
        try:
            return _Settings(
                **{**plain, **given, "do_sample": bool(sampling), "max_new_tokens": max_new_tokens, "max_length": None}
            )
        except (ValueError, TypeError) as exc:
            raise Refusal(400, f"generation options: {_first_line(exc)}", code="invalid_value") from exc

    def generate(
        self,
        order: Order,
        *,
        on_text: Callable[[str], None] = lambda _: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Make one answer; `on_text` gets its pieces (not with beam search), `cancelled` is asked after each token.

        Raises:
            OutOfMemoryError: too little memory for this one; the engine goes on.
            Refusal: (400) transformers does not take the options that the requester chose.
        """
        config = order.config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        collector = TextCollector(
            lambda tokens: _decode(self._decoder, tokens),
            prompt=order.prompt, stop=order.stop, end_tokens=ends, on_text=on_text,
        )  # fmt: skip
        torch.manual_seed(secrets.randbits(63) if order.seed is None else order.seed)
        beams = (config.num_beams or 1) > 1
        watch = _Watch(None if beams else collector, cancelled)
        prompt = torch.tensor([order.prompt], device=self._base.device)
        with _memory_errors(order.model), torch.inference_mode(), self._as(order.model):
            try:
                output = self._base.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
            except (ValueError, TypeError, IndexError, AttributeError) as exc:
                if not order.open_options:
                    raise
                raise Refusal(400, f"generation options: {_first_line(exc)}", code="invalid_value") from exc
        tokens = tuple(output[0, prompt.shape[1] :].tolist())
        if beams:
            for token in tokens:
                if collector.push(token):
                    break
        text = collector.finish()
        reason = "cancelled" if watch.cut else "stop" if collector.stopped else "length"
        return Answer(text, tokens, len(order.prompt), collector.count, reason)

    def _as(self, name: str) -> AbstractContextManager[Any]:
        if self._peft is None:
            return nullcontext()
        if name == self.base_name:
            disabled: AbstractContextManager[Any] = self._peft.disable_adapter()
            return disabled
        tuner: Any = self._peft.base_model  # takes several at once; PeftModel's own method takes one
        tuner.set_adapter(self._adapters[name], inference_mode=True)
        return nullcontext()


class _Watch:
    """Sees every token as it is made; ends the generation on a stop string, or when nobody waits for it any more."""

    def __init__(self, collector: TextCollector | None, cancelled: Callable[[], bool]) -> None:
        self._collector = collector
        self._cancelled = cancelled
        self.cut = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = self._collector is not None and self._collector.push(int(input_ids[0, -1]))
        if not done and self._cancelled():
            self.cut = done = True
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


def _quantization(section: Mapping[str, Any] | None) -> Any:
    if not section or not (section.get("load_in_4bit") or section.get("load_in_8bit")):
        return None
    return _Quantization(**section)


def _keep_plain_kernels(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit layers for its fused CPU kernel.

    That kernel (0.50.2) fails on some layer sizes, and its rounding is not that of the model that was trained.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _end_tokens(tokenizer: Any, defaults: Mapping[str, Any]) -> tuple[int, ...]:
    """Every token that ends an answer: the model's, the tokenizer's, and the ends of turn among its added ones."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    found = [*_integers(defaults.get("eos_token_id")), *_integers(tokenizer.eos_token_id)]
    found += [added[token] for token in TURN_ENDS if token in added]
    if not found:
        raise WeightsError("neither the model nor its tokenizer names an end token", code="weights-unreadable")
    return tuple(dict.fromkeys(found))


def _fitting_keys(base: Any, weights: Path) -> set[str]:
    """Return the adapter's tensor names, if the base has a place of the right size for each LoRA matrix.

    Raises:
        ImageError: (code `adapter-misfit`).
    """
    modules = dict(base.named_modules())
    with safetensors.safe_open(str(weights), framework="pt") as file:
        keys = set(file.keys())
        for key in sorted(keys):
            name, side, _ = key.removeprefix("base_model.model.").partition(".lora_")
            kind = key.removeprefix(f"base_model.model.{name}.lora_")
            if not side or kind not in ("A.weight", "B.weight"):
                continue
            module = modules.get(name)
            if module is None:
                raise ImageError(
                    f"the adapter changes {name}, which the base model does not have",
                    place=str(weights),
                    hint="it was made for another base model",
                    code="adapter-misfit",
                )
            base_layer = getattr(module, "base_layer", module)
            width = "in_features" if kind == "A.weight" else "out_features"
            theirs = file.get_slice(key).get_shape()[1 if kind == "A.weight" else 0]
            ours = getattr(base_layer, width, theirs)
            if theirs != ours:
                raise ImageError(
                    f"{name}: the adapter has {width} {theirs}, the base model {ours}",
                    place=str(weights),
                    hint="it was made for another base model",
                    code="adapter-misfit",
                )
    return keys


def _decode(tokenizer: Any, tokens: Sequence[int], *, clean_up: bool = False) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=clean_up)
    return text


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _is_out_of_memory(exc: BaseException) -> bool:
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(exc)


@contextmanager
def _memory_errors(place: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not _is_out_of_memory(exc):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(_first_line(exc) or "no memory left", place=place) from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
