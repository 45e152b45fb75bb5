"""Byte-level BPE tokenizers, written as the files that transformers and tokenizers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kaito_flows.containers.weights.folder import write_json

__all__ = ["ByteLevelTokenizer"]


@dataclass(frozen=True, slots=True)
class ByteLevelTokenizer:
    """A byte-level BPE tokenizer.

    `tokens` are in the order of their ids, `merges` are pairs in the order in which they apply, `special` are the
    tokens that are never split. `single_digits`: every digit is a token of its own, as in SmolLM2.
    """

    tokens: Sequence[str]
    merges: Sequence[tuple[str, str]]
    special: Sequence[str]
    bos: str
    eos: str
    pad: str
    unknown: str
    chat_template: str
    context_length: int
    single_digits: bool = False

    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(self.merges)))
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.single_digits else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        return tokenizer

    def write(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, the chat template inside."""
        self.tokenizer().save(str(folder / "tokenizer.json"))
        # The generic class: transformers 5's GPT2Tokenizer and LlamaTokenizer put a pre-tokenizer of their own in.
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.pad,
            "unk_token": self.unknown,
            "model_max_length": self.context_length,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            "chat_template": self.chat_template,
        }
        write_json(folder / "tokenizer_config.json", config)

    def token_id(self, token: str) -> int:
        """The id of a token."""
        return self.tokens.index(token)
