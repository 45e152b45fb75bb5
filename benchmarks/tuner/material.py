"""What every contestant trains: a Phi-3 with random weights, and one file of chats.

The tokenizer's tokens are whole words, `w0`, `w1`, ..., so that a chat has just as many tokens as it is to have.
Lengths are drawn from a log-normal distribution like that of the Alpaca chats (median 105 tokens, mean 181, 95 % below
585). Words are uniform over the vocabulary; in answers four of five follow from the word before, so that there is
something to learn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LINEAR", "SIZES", "Chats", "write_chats", "write_weights"]

LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
"""All linear layers in a block of a Phi-3."""

SIZES: dict[str, dict[str, Any]] = {
    # The shape of the preset tiny-phi-3.
    "tiny": {
        "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08,
    },
    "small": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08,
    },
    # What transformers' Phi3Config has by itself.
    "phi-3-mini": {},
}  # fmt: skip

MEDIAN, SIGMA = 105.0, 1.0437
LONGEST = 8192
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
AROUND = 5
"""Tokens of a chat that are not words: two roles, two ends of turns, the end of the text."""

# Phi-3's; the marks say to TRL which tokens are the assistant's: its words and the end of its turn.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|> ' + message['content'] + ' <|end|> ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|> ' }}{% generation %}{{ message['content'] + ' <|end|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% else %}{{ ' ' + eos_token }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Chats:
    """The file, and the lengths of its chats in tokens."""

    path: Path
    lengths: tuple[int, ...]

    def mean(self, longest: int) -> float:
        """The mean length of chats that are cut at `longest` tokens."""
        return sum(min(length, longest) for length in self.lengths) / len(self.lengths)

    def reach(self, longest: int) -> int:
        """The length of the chat that a token is in, on the mean of tokens and not of chats."""
        cut = [min(length, longest) for length in self.lengths]
        return round(sum(length * length for length in cut) / sum(cut))


def write_weights(size: str, folder: Path, *, seed: int = 0) -> None:
    """Write configuration, tokenizer and bfloat16 weights of a random Phi-3 of that size."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Phi3Config(
        **SIZES[size], max_position_embeddings=LONGEST, original_max_position_embeddings=LONGEST,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    words = [*SPECIAL, *(f"w{i}" for i in range(config.vocab_size - len(SPECIAL)))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=SPECIAL[0],
        unk_token=SPECIAL[0], chat_template=TEMPLATE, model_max_length=LONGEST,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = [0, SPECIAL.index("<|end|>")]
    model.save_pretrained(folder)
    whole.save_pretrained(folder)


def write_chats(path: Path, count: int, size: str, *, seed: int = 0) -> Chats:
    """Write `count` chats of a question and an answer each, one JSON object a line."""
    random = np.random.RandomState(seed)
    words = SIZES[size].get("vocab_size", 32064) - len(SPECIAL)
    drawn = np.exp(random.normal(math.log(MEDIAN), SIGMA, count)).round().astype(int)
    lengths = tuple(int(length) for length in drawn.clip(AROUND + 2, LONGEST))
    with path.open("w", encoding="utf-8") as out:
        for length in lengths:
            question = max(1, min(length - AROUND - 1, round((length - AROUND) * random.uniform(0.1, 0.5))))
            answer = length - AROUND - question
            asked = random.randint(words, size=question).tolist()
            turns = [("user", asked), ("assistant", list(_answer(random, asked[-1], answer, words)))]
            messages = [{"role": role, "content": " ".join(f"w{i}" for i in said)} for role, said in turns]
            out.write(json.dumps({"messages": messages}) + "\n")
    return Chats(path, lengths)


def _answer(random: np.random.RandomState, word: int, length: int, words: int) -> Iterator[int]:
    for follows, other in zip(random.rand(length) < 0.8, random.randint(words, size=length), strict=True):
        word = (word * 5 + 7) % words if follows else int(other)
        yield word
