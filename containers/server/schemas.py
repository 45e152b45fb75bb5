"""Request bodies: KAITO's and OpenAI's. What a request may not say is refused here by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["ChatCompletionRequest", "ChatRequest", "CompletionRequest", "GenerateKwargs", "Message", "SamplingRequest"]

MAX_BEAMS = 16
MAX_STOPS = 16


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_utf8)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(gt=0, le=10)]
Stop = Annotated[Text, Field(min_length=1, max_length=500)]


class TextPart(BaseModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a conversation. Keys that a client copies from an answer (`refusal`, `annotations`) do no harm."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    tool_calls: list[Any] | None = None

    @model_validator(mode="after")
    def _only_text(self) -> Message:
        if self.tool_calls:
            raise ValueError("tool_calls are not supported")
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it; `developer` is the newer name of `system`."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class GenerateKwargs(BaseModel):
    """KAITO's `generate_kwargs` with its defaults; any other option of transformers' `generate` may be added."""

    model_config = ConfigDict(extra="allow")

    max_length: int | None = Field(200, ge=1, description="prompt and answer together, in tokens")
    min_length: int | None = Field(0, ge=0)
    do_sample: bool | None = True
    early_stopping: bool | Literal["never"] | None = False
    num_beams: int | None = Field(1, ge=1, le=MAX_BEAMS)
    temperature: Temperature | None = 1.0
    top_k: int | None = Field(10, ge=0)
    top_p: Share | None = 1.0
    typical_p: Share | None = 1.0
    repetition_penalty: Penalty | None = 1.0
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    max_new_tokens: int | None = Field(None, ge=1, description="the answer alone; goes before max_length")


class ChatRequest(BaseModel):
    """KAITO's body of `POST /chat`. Unknown keys do nothing, as there.

    `prompt` is continued as it stands, without the chat template; `messages` are answered through it. `model` is ours.
    """

    prompt: Text | None = None
    messages: list[Message] | None = None
    model: Text | None = Field(None, description="the base's preset or an adapter; the first adapter if left out")
    return_full_text: bool | None = Field(True, description="with a prompt: the prompt and its continuation")
    clean_up_tokenization_spaces: bool | None = False
    prefix: Text | None = Field(None, description="put before the prompt, not returned")
    handle_long_generation: Literal["hole"] | None = Field(
        None, description="hole: cut the prompt's beginning where it is too long"
    )
    generate_kwargs: GenerateKwargs | None = None


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class SamplingRequest(BaseModel):
    """What OpenAI's two completion bodies share. `top_k`, `min_p` and `repetition_penalty` are vLLM's additions."""

    model_config = ConfigDict(extra="forbid")

    model: Text | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: Share | None = None
    repetition_penalty: Penalty | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = 0
    frequency_penalty: float | None = 0
    # These ask for nothing that changes an answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("only one answer a request is made")
        return value

    @field_validator("logit_bias", "presence_penalty", "frequency_penalty")
    @classmethod
    def _not_supported(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported")
        return value

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have, if the request says."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def options(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The sampling as options of transformers' `generate`; temperature 0 and top_p 0 are greedy."""
        sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **defaults}
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        sampling |= {key: value for key, value in asked.items() if value is not None}
        sampling["top_k"] = max(0, sampling["top_k"])
        penalty = {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty else {}
        if not sampling["temperature"] or not sampling["top_p"]:
            return penalty
        return {"do_sample": True, **sampling, **penalty}


class ResponseFormat(BaseModel):
    """The form of an answer: text is the only one."""

    type: Literal["text"]


class ChatCompletionRequest(SamplingRequest):
    """OpenAI's body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: None = None
    functions: None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have, if the request says."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(SamplingRequest):
    """OpenAI's body of `POST /v1/completions`: one prompt, continued as it stands."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
