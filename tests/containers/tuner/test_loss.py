"""The loss in chunks is the loss, whatever a model does with its logits; and no more logits are there at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kaito_flows.containers.tuner import loss
from kaito_flows.containers.tuner.data import Batch
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.sharding import shard
from kaito_flows.containers.tuner.world import ALONE

from .conftest import TARGETS, adapted_model, make_model

# Those of the exactness tests, and those that scale or cap their logits, or are built otherwise.
KINDS = [*TARGETS, "gemma2", "granite", "cohere", "falcon", "olmo2", "mixtral"]
SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 2},
}  # fmt: skip


def batch(rows: int = 3, length: int = 20) -> Batch:
    """Rows of two documents each, with a target after every token but each document's last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (rows, length), generator=generator)
    positions = torch.cat([torch.arange(8), torch.arange(length - 8)]).repeat(rows, 1)
    sources = torch.tensor([r * length + i for r in range(rows) for i in range(length) if i not in (7, length - 1)])
    return Batch(ids, positions, sources, ids.flatten()[sources + 1], rows * length)


def head_sizes(model: Any) -> list[int]:
    """How many tokens go through the head in each call, from now on."""
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[:-1].numel()))
    return sizes


def measured(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of what is trained."""
    model.zero_grad()
    summed = loss_sum(model, batch())
    summed.backward()
    return summed.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    """A model whose blocks are trained, and its head is not."""
    made = make_model(request.param, **SCALED.get(request.param, {}))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(".layers." in f".{name}" or ".h." in f".{name}")
    return made.train()


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of 7 targets."""
    monkeypatch.setattr(loss, "CHUNK", 7)
    monkeypatch.setattr(loss, "LOGITS", 256)


def test_chunks_change_neither_the_loss_nor_a_gradient(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = head_sizes(model)
    loss_of_all, gradients = measured(model)
    assert sizes == [54]
    sizes.clear()
    small(monkeypatch)
    in_chunks, others = measured(model)
    assert sizes == [1, *[7] * 7, 5], "never more than a chunk"
    torch.testing.assert_close(in_chunks, loss_of_all, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys() and gradients
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6 * largest)
    with torch.no_grad():
        torch.testing.assert_close(loss_sum(model, batch()), loss_of_all, rtol=1e-6, atol=0)
    monkeypatch.undo()
    again, _ = measured(model)
    assert again == loss_of_all, "and the model is what it was"


def test_what_caps_and_scales_do_is_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    for kind in ("gemma2", "granite", "cohere"):
        scaled, plain = (make_model(kind, **options) for options in (SCALED[kind], {}))
        assert abs(loss_sum(scaled, batch()) - loss_sum(plain, batch())).item() > 1e-2, kind


def test_all_logits_are_made_at_once_where_the_head_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    model = make_model("llama")
    sizes = head_sizes(model)
    model.get_output_embeddings().weight.requires_grad_()
    _, gradients = measured(model)
    assert sizes == [54]
    assert "lm_head.weight" in gradients


@pytest.fixture
def group() -> Iterator[None]:
    """A group of processes, of which this is the only one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("shared", [False, True], ids=["a head of its own", "the embedding's weights"])
def test_of_a_divided_model_too_unless_its_head_is_divided_with_it(
    shared: bool, tmp_path: Path, resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path / "llama", tie_word_embeddings=shared)
    found = []
    for divided in (False, True):
        adapted = adapted_model(tmp_path / "llama", resolved("lora", "llama"))
        with torch.no_grad():
            for name, parameter in adapted.parameters.items():
                if ".lora_B." in name:
                    parameter.fill_(0.01)
        if divided:
            small(monkeypatch)
            adapted = shard(adapted, ALONE)
        with torch.no_grad():
            loss_sum(adapted.model, batch())  # as an evaluation does, after which what was gathered stays
        sizes = head_sizes(adapted.model)
        found.append((*measured(adapted.model), sizes))
    (expected, gradients, _), (loss_in_parts, others, sizes) = found
    assert sizes == [54] if shared else [1, *[7] * 7, 5]
    torch.testing.assert_close(loss_in_parts, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys() and gradients
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6 * largest)
