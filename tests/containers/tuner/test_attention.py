"""Attention among documents of one row: what each document gets alone, forwards and backwards."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kaito_flows.containers.tuner import attention, isolation
from kaito_flows.containers.tuner.attention import Documents, attend
from kaito_flows.containers.tuner.data import Dataset
from kaito_flows.containers.tuner.isolation import choose_isolation
from kaito_flows.containers.tuner.samples import _generate
from kaito_flows.errors import WeightsError

from .conftest import make_model

CPU = torch.device("cpu")
SIZES = [5, 1, 140, 9, 2, 130, 33, 1]
HEADS, KEY_HEADS, SIZE = 4, 2, 16
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(SIZES), SIZE).to(device, dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Each document by itself, with a mask that is written out."""
    outputs = []
    for start, end in pairwise([0, *torch.tensor(SIZES).cumsum(0).tolist()]):
        place = torch.arange(end - start, device=q.device)
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < (window or end))
        parts = (t[:, :, start:end].repeat_interleave(HEADS // t.shape[1], 1) for t in (q, k, v))
        outputs.append(scaled_dot_product_attention(*parts, attn_mask=seen, scale=0.3))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, device: torch.device = CPU) -> Any:
    documents = Documents(SIZES, device)
    return attend(torch.nn.Module(), q, k, v, None, documents=documents, scaling=0.3, sliding_window=window)[0]


def compare(window: int | None, device: torch.device, dtype: torch.dtype, **tolerances: float) -> None:
    found = []
    for how in (attended, alone):
        inputs = tensors(device, dtype)
        output = how(*inputs, window)[0] if how is alone else attended(*inputs, window, device)[0]
        weight = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
        found.append((output, *torch.autograd.grad((output.float() * weight).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)


@pytest.mark.parametrize("window", [None, 3, 64, 4096], ids=lambda window: f"window {window}")
def test_each_document_gets_what_it_gets_alone(window: int | None) -> None:
    compare(window, CPU, torch.float32, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3, 64], ids=lambda window: f"window {window}")
def test_on_a_gpu_too(window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    compare(window, torch.device("cuda"), torch.bfloat16, rtol=2e-2, atol=2e-2)


def test_documents_that_are_about_equally_long_are_attended_to_together() -> None:
    groups, back = Documents([3, 2, 9, 2], CPU).groups
    assert [group.tolist() for group in groups] == [
        [[5, 6, 7, 8, 9, 10, 11, 12, 13]],
        [[0, 1, 2], [3, 4, 4], [14, 15, 15]],
    ]
    assert torch.cat([group.flatten() for group in groups])[back].tolist() == list(range(16))


def test_on_a_gpu_it_is_asked_for_as_flash_attention_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is asked, as it is not here: its bounds, and a window that does not count the token itself."""
    asked: dict[str, Any] = {}

    def kernel(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        asked.update(options, shape=tuple(q.shape), bounds=args[2].tolist(), dtype=args[2].dtype, longest=args[4])
        return q

    monkeypatch.setattr(attention, "_has_flash", lambda _: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    bounds = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    assert attended(*tensors(), 64).shape == (1, sum(SIZES), HEADS, SIZE)
    assert asked == {
        "shape": (sum(SIZES), HEADS, SIZE), "bounds": bounds, "dtype": torch.int32, "longest": 140, "scale": 0.3,
        "window_size": (63, 0), "enable_gqa": True,
    }  # fmt: skip
    attended(*tensors(), 4096)
    assert asked["window_size"] == (-1, 0)


def test_a_model_that_writes_text_attends_as_it_does_by_itself(dataset: Dataset) -> None:
    model = make_model("llama").eval()
    prompts = {"input_ids": torch.tensor([[0, 0, 9, 11, 12], [5, 6, 7, 8, 9]])}
    prompts["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokenizer: Any = SimpleNamespace(pad_token_id=0, batch_decode=lambda ids, **_: [str(row.tolist()) for row in ids])
    adapted: Any = SimpleNamespace(model=model, device=CPU, sharded=False)
    before = _generate(adapted, tokenizer, prompts)
    assert choose_isolation(model, "llama") == "documents"
    assert _generate(adapted, tokenizer, prompts) == before


def test_where_the_kernel_fails_documents_are_kept_apart_in_the_models_own_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(attention, "_has_flash", lambda _: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    model = make_model("llama")
    assert choose_isolation(model, "llama") == "positions"
    assert model.config._attn_implementation == "sdpa"


def test_memory_that_runs_out_meanwhile_is_not_taken_for_a_kernel_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(attention, "_has_flash", lambda _: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with pytest.raises(torch.OutOfMemoryError):
        choose_isolation(make_model("llama"), "llama")


@pytest.mark.parametrize("leak", ["logits", "gradients"])
def test_an_attention_that_leaks_is_found_out(leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x + x.roll(8, 1) if leak == "logits" else x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] + gradients[0].roll(-8, 1) if leak == "gradients" else gradients[0]

    whole = attention.attend

    def leaking(*args: Any, **options: Any) -> Any:
        return Leaks.apply(whole(*args, **options)[0]), None  # type: ignore[no-untyped-call]

    attention.AttentionInterface.register(attention.NAME, leaking)
    try:
        assert choose_isolation(make_model("llama"), "llama") == "positions"
    finally:
        attention.AttentionInterface.register(attention.NAME, whole)


def test_an_attention_that_gives_something_else_is_found_out() -> None:
    def other(
        module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **given: Any
    ) -> Any:
        scaling = {"scaling": 3.0} if given.get("documents") else {}
        return attend(module, q, k, 4 * v if scaling else v, *args, **given | scaling)

    attention.AttentionInterface.register(attention.NAME, other)
    try:
        assert choose_isolation(make_model("llama"), "llama") == "positions"
    finally:
        attention.AttentionInterface.register(attention.NAME, attend)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_is_not_done_here_is_refused_and_not_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        attend(torch.nn.Module(), *tensors(), None, documents=Documents(SIZES, CPU), **{name: 1.0})
    attend(torch.nn.Module(), *tensors(), None, documents=Documents(SIZES, CPU), **{name: None})


def test_a_model_whose_attention_is_in_chunks_keeps_its_own() -> None:
    model = make_model("llama")
    model.config.attention_chunk_size = 8
    assert choose_isolation(model, "llama") == "positions"


def test_a_model_that_keeps_nothing_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_isolates", lambda *_: False)
    with pytest.raises(WeightsError, match="lets documents in one row see each other"):
        choose_isolation(make_model("llama"), "a preset")


def test_the_chosen_attention_is_written_in_no_file(tmp_path: Path) -> None:
    model = make_model("llama")
    choose_isolation(model, "llama")
    model.config.save_pretrained(tmp_path)
    assert "documents" not in (tmp_path / "config.json").read_text()
