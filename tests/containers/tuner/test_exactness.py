"""Trained exactly: against plain loops of transformers and PEFT alone, over model families and variants of LoRA.

What stands here as a reference has nothing of the tuner's in it: documents one by one, each alone in its row, labels as
transformers takes them, gradients through PEFT's own layers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kaito_flows.containers.server.engine import Engine
from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Batch, Dataset, Split
from kaito_flows.containers.tuner.evaluation import evaluate
from kaito_flows.containers.tuner.job import TrainingConfig
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import Adapted, adapter_files, prove
from kaito_flows.containers.tuner.portion import Portion
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.training import train
from kaito_flows.dataset import packing
from kaito_flows.dataset.chat import Chat
from kaito_flows.dataset.tokens import ChatTokenizer
from kaito_flows.errors import PreemptedError

from .conftest import IDENTITY, PAD, TARGETS, adapted_model, make_model

CPU = torch.device("cpu")
KINDS = sorted(TARGETS)


@dataclass(frozen=True)
class Document:
    """A document alone: its tokens, and what transformers takes as labels of them."""

    ids: torch.Tensor
    labels: torch.Tensor


def documents(split: Split, rows: list[int]) -> list[Document]:
    """The rows' documents that have something to learn, in order."""
    found = []
    for row in rows:
        ids, mask, positions = (t[row].numpy() for t in (split.input_ids, split.loss_mask, split.position_ids))
        for start, end in pairwise([*np.flatnonzero(positions == 0), len(ids)]):
            if mask[start + 1 : end].any():
                part = torch.tensor(ids[start:end].astype(np.int64))[None]
                learned = torch.tensor(mask[start:end] != 0)[None]
                found.append(Document(part, torch.where(learned, part, -100)))
    return found


def alone(model: Any, document: Document) -> torch.Tensor:
    """The summed loss of a document, as transformers computes it."""
    output = model(input_ids=document.ids, labels=document.labels)
    loss: torch.Tensor = output.loss * int((document.labels[:, 1:] != -100).sum())
    return loss


def samples(batch: Batch) -> Iterator[tuple[tuple[int, ...], Batch]]:
    """Each document of a packed batch: its tokens, and the whole batch with nothing but its targets."""
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    document = (positions == 0).cumsum(0) - 1
    for number in document[batch.sources].unique().tolist():
        chosen = document[batch.sources] == number
        tokens = tuple(ids[document == number].tolist())
        yield tokens, replace(batch, sources=batch.sources[chosen], labels=batch.labels[chosen])


def perturbed(adapted: Adapted) -> Adapted:
    """With B matrices that are not zero, so that A has gradients too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return adapted


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_loss_and_the_gradients_that_it_has_alone(
    kind: str, method: str, models: dict[str, Path], dataset: Dataset, resolved: Any
) -> None:
    adapted = perturbed(adapted_model(models[kind], resolved(method, kind)))
    rows = [0, 5, 6]
    expected = {tuple(d.ids[0].tolist()): d for d in documents(dataset.train, rows)}
    seen = 0
    for tokens, sample in samples(dataset.train.batch(torch.tensor(rows), CPU, flat=adapted.flat)):
        losses, gradients = [], []
        for loss in (loss_sum(adapted.model, sample, masked=adapted.masked), alone(adapted.model, expected[tokens])):
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: p.grad.clone() for name, p in adapted.parameters.items()})  # type: ignore[union-attr]
            adapted.peft.zero_grad()
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)
        largest = max(float(g.abs().max()) for g in gradients[1].values())
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4 * largest)
        seen += 1
    assert seen == len(expected) >= 6


def test_positions_restart_at_each_document_and_count_up_in_it(dataset: Dataset) -> None:
    batch = dataset.train.batch(torch.tensor([0, 5, 6]), CPU)
    lengths = [d.ids.shape[1] for d in documents(dataset.train, [0, 5, 6])]
    found = []
    for row in batch.position_ids.tolist():
        starts = [*(i for i, position in enumerate(row) if position == 0), len(row)]
        assert row == [place - start for start, end in pairwise(starts) for place in range(start, end)]
        found += [end - start for start, end in pairwise(starts)]
    # What no document fills counts up on its own.
    assert not Counter(lengths) - Counter(found)


def test_token_by_token_a_chats_answer_and_its_end_are_predicted_each_from_what_stands_before(
    models: dict[str, Path],
) -> None:
    """From the text of three chats to what the loss compares, shown as `from→target`."""
    tokenizer = ChatTokenizer(models["llama"])
    template = tokenizer.template
    chats = [("t30 t31", "t50 t51"), ("t32", "t60"), ("t33 t34 t35", "t70")]
    written = [
        Chat([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], 0, 1)
        for asked, answer in chats
    ]
    encoded = list(tokenizer.encode([template.place(chat) for chat in written]))
    packed = packing.pack(encoded, length=24, packing=True, pad_id=PAD)
    assert len(packed.input_ids) < len(chats)
    arrays = (packed.input_ids, packed.loss_mask, packed.position_ids)
    lengths = torch.from_numpy((packed.input_ids != PAD).sum(1))
    split = Split(*(torch.from_numpy(array) for array in arrays), lengths=lengths)
    batch = split.batch(torch.arange(len(split)), CPU)
    ids = batch.input_ids.flatten()
    shown = [f"t{ids[s]}→t{label}" for s, label in zip(batch.sources.tolist(), batch.labels.tolist(), strict=True)]
    # t3 and t4 stand around the question, t2 ends the answer.
    assert sorted(shown) == sorted(
        ["t4→t50", "t50→t51", "t51→t2", "t4→t60", "t60→t2", "t4→t70", "t70→t2"],
    )


def plain_model(folder: Path, config: TrainingConfig) -> Any:
    """Base and adapter as a user of PEFT makes them."""
    bits, lora = config.QuantizationConfig, config.LoraConfig
    quantization = None
    if bits.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=bits.bnb_4bit_quant_type, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    torch.manual_seed(config.TrainingArguments.seed)
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=int(lora.lora_alpha), target_modules=sorted(lora.target_modules), bias="none",
        use_rslora=lora.use_rslora, use_dora=lora.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(base, settings)


def plain_training(model: Any, config: TrainingConfig, dataset: Dataset, steps: int) -> Iterator[float]:
    """Train with torch's AdamW and transformers' schedule, document by document; yield each step's loss."""
    arguments = config.TrainingArguments
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay, fused=False, foreach=False
    )
    schedule = transformers.get_scheduler(
        arguments.lr_scheduler_type, optimizer, num_warmup_steps=arguments.warmup_steps, num_training_steps=steps
    )
    rows, each = len(dataset.train), arguments.rows_a_step
    model.train()
    for step in range(steps):
        start = (step * each) % rows
        chosen = documents(dataset.train, [row % rows for row in range(start, start + each)])
        targets = sum(int((d.labels[:, 1:] != -100).sum()) for d in chosen)
        total = 0.0
        for document in chosen:
            loss = alone(model, document) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield total


def curve(state: State) -> list[float]:
    return [entry["loss"] for entry in state.history if entry["event"] == "progress"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_the_loss_curve_of_a_plain_loop(
    kind: str, models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    config = resolved("lora", kind, max_steps=6, shuffle_dataset=False, logging_steps=1)
    adapted = adapted_model(models[kind], config)
    state = train(adapted, dataset, config, IDENTITY, tmp_path, Preemption())
    expected = list(plain_training(plain_model(models[kind], config), config, dataset, 6))
    assert curve(state) == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0]


def test_over_200_steps_qlora_stays_within_a_hundredth_of_a_plain_loop(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    config = resolved(
        "qlora", "phi3", max_steps=200, shuffle_dataset=False, logging_steps=1, learning_rate=2e-3, save_steps=1000,
        per_device_train_batch_size=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    adapted = adapted_model(models["phi3"], config)
    state = train(adapted, dataset, config, IDENTITY, tmp_path, Preemption())
    expected = list(plain_training(plain_model(models["phi3"], config), config, dataset, 200))
    furthest = max(abs(ours - theirs) for ours, theirs in zip(curve(state), expected, strict=True))
    assert furthest < 1e-2, furthest
    assert expected[-1] < expected[0] - 1


class Killed(BaseException):
    """The process is gone."""


class After(Preemption):
    """What comes after that many steps of the whole training, in the middle of a later one: a kill, or SIGTERM."""

    def __init__(self, history: Path, steps: int, *, kills: bool) -> None:
        self.history, self.steps, self.kills = history, steps, kills

    @property
    def requested(self) -> bool:
        if not self.history.exists() or self.history.read_text().count('"progress"') < self.steps:
            return False
        if self.kills:
            raise Killed
        return True

    @requested.setter
    def requested(self, value: bool) -> None: ...


HARD = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2, "num_train_epochs": 1.0}
BFLOAT16 = {"torch_dtype": "bfloat16", "bnb_4bit_compute_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("method", "kind", "changed"),
    [
        # bfloat16 in 4 bits: where an evaluation would have bitsandbytes repack its layers.
        ("qlora", "phi3", {"lora_dropout": 0.1, **BFLOAT16}),
        ("qlora", "gemma", {"use_dora": True, "gradient_checkpointing": True}),
        ("lora", "qwen2", {"use_rslora": True, "lora_dropout": 0.1}),
        ("lora", "mistral", BFLOAT16),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stopped_at_any_step_it_ends_with_the_same_bytes(
    method: str, kind: str, changed: dict[str, Any], models: dict[str, Path], dataset: Dataset, resolved: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = resolved(method, kind, **HARD, **changed)

    def go_on(name: str, stopping_after: int | None = None, *, kills: bool = True) -> Any:
        results = tmp_path / name
        adapted = adapted_model(models[kind], config)
        if stopping_after is None:
            state = train(adapted, dataset, config, IDENTITY, results, Preemption())
            return adapter_files(adapted).weights, state.history, state.tokens, state.targets
        preemption = After(results / "history.jsonl", stopping_after, kills=kills)
        with pytest.raises(Killed if kills else PreemptedError):
            train(adapted, dataset, config, IDENTITY, results, preemption)
        return None

    undisturbed = go_on("whole")
    total = undisturbed[1][-1]["step"]
    assert total == 5
    # Killed, it has lost what came after its last checkpoint, if it has one.
    for step in range(total):
        go_on(f"killed-{step}", step)
        assert go_on(f"killed-{step}") == undisturbed
    # By SIGTERM it is stopped after every single step, and loses nothing.
    for step in range(total):
        go_on("stopped", step, kills=False)
    assert go_on("stopped") == undisturbed


VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def loss_on(model: Any, split: Split) -> float:
    """The mean loss of a model that the tuner did not make, document by document."""
    parts = documents(split, list(range(len(split))))
    with torch.no_grad():
        total = sum(float(alone(model, document)) for document in parts)
    return total / sum(int((d.labels[:, 1:] != -100).sum()) for d in parts)


def published(adapted: Adapted, folder: Path) -> Path:
    files = adapter_files(adapted)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(files.weights)
    (folder / "adapter_config.json").write_text(json.dumps(dict(files.config)))
    return folder


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_and_served_it_is_what_was_trained(
    method: str, variant: str, dropout: float, models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    kind = {"lora": "qwen2", "qlora": "phi3"}[method]
    config = resolved(method, kind, lora_dropout=dropout, num_train_epochs=1.0, **VARIANTS[variant])
    adapted = adapted_model(models[kind], config)
    state = train(adapted, dataset, config, IDENTITY, tmp_path / "results", Preemption())
    assert dataset.validation is not None
    before, after = (entry["loss"] for entry in state.history if entry["event"] == "evaluation")
    assert after < before - 0.1
    assert prove(adapted)["modules_adapted"] == 2 * len(TARGETS[kind])
    folder = published(adapted, tmp_path / "adapter")

    # As PEFT loads it, on a base of its own.
    model = plain_model(models[kind], config).unload()
    loaded = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    assert loss_on(loaded, dataset.validation) == pytest.approx(after, rel=1e-4)

    # Merged, in float32: a base in 4 bits is expanded first, for merging into 4 bits would round what was learned.
    dequantized = loaded.unload()
    if method == "qlora":
        dequantized = dequantized.dequantize()
    merged = peft.PeftModel.from_pretrained(dequantized, str(folder)).merge_and_unload().eval()
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    assert loss_on(merged, dataset.validation) == pytest.approx(after, rel=1e-3)

    # Served, and with nothing left of it in the base.
    bits = json.loads(json.dumps(config_section(config))) if method == "qlora" else None
    engine = Engine.load(models[kind], name="base", torch_dtype="float32", quantization=bits)
    engine.add_adapter("tuned", folder)
    served = {}
    for name in ("tuned", "base"):
        with engine._as(name):
            served[name] = loss_on(engine._base, dataset.validation)
    assert served["tuned"] == pytest.approx(after, rel=1e-4)
    assert served["base"] == pytest.approx(before, rel=1e-4)


def config_section(config: TrainingConfig) -> dict[str, Any]:
    section = config.QuantizationConfig
    return {name: getattr(section, name) for name in section.__slots__}


@pytest.mark.parametrize("kind", KINDS)
def test_every_target_module_of_every_family_is_adapted_and_changes_what_comes_out(
    kind: str, models: dict[str, Path], resolved: Any
) -> None:
    adapted = adapted_model(models[kind], resolved("lora", kind))
    ids = torch.arange(20, 40)[None]
    adapted.peft.eval()
    with torch.no_grad():
        base = adapted.model(input_ids=ids).logits
        for name, parameter in adapted.parameters.items():
            if ".lora_B." in name:
                parameter.fill_(0.1)
                assert not torch.equal(adapted.model(input_ids=ids).logits, base), name
                parameter.zero_()
        assert torch.equal(adapted.model(input_ids=ids).logits, base)
    assert sorted(adapted.matched) == sorted(TARGETS[kind])
    assert sum(map(len, adapted.matched.values())) == 2 * len(TARGETS[kind])


def test_a_micro_batch_counts_by_its_targets_and_not_as_one_of_several(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    """One row with a single target and three with many: in a mean of means, the first would weigh as much."""
    train_split = dataset.train
    mask = train_split.loss_mask[:4].clone()
    [first, *_] = (mask[0] * (train_split.position_ids[0] > 0)).nonzero().flatten().tolist()
    mask[0] = 0
    mask[0, first] = 1
    uneven = Split(train_split.input_ids[:4], mask, train_split.position_ids[:4], train_split.lengths[:4])
    config = resolved("lora", "llama", max_steps=1, logging_steps=1, per_device_train_batch_size=1,
                      gradient_accumulation_steps=4)  # fmt: skip
    model = plain_model(models["llama"], config).eval()
    with torch.no_grad():
        losses = [[float(alone(model, d)) for d in documents(uneven, [row])] for row in range(4)]
        targets = [sum(int((d.labels[:, 1:] != -100).sum()) for d in documents(uneven, [row])) for row in range(4)]
    by_tokens = sum(map(sum, losses)) / sum(targets)
    by_rows = sum(sum(loss) / count for loss, count in zip(losses, targets, strict=True)) / 4
    assert not math.isclose(by_tokens, by_rows, rel_tol=1e-2)
    adapted = adapted_model(models["llama"], config)
    state = train(adapted, Dataset(uneven, None, {}), config, IDENTITY, tmp_path, Preemption())
    assert curve(state) == pytest.approx([by_tokens], rel=1e-5)


@pytest.mark.parametrize("changed", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    changed: dict[str, Any], models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    def bytes_of(name: str, **more: Any) -> bytes:
        config = resolved("qlora", "phi3", max_steps=3, **changed, **more)
        adapted = adapted_model(models["phi3"], config)
        # What happened in the process before is of no matter.
        torch.rand(int(name, 36) % 7 + 1)
        train(adapted, dataset, config, IDENTITY, tmp_path / name, Preemption())
        return adapter_files(adapted).weights

    assert bytes_of("a") == bytes_of("b")
    assert bytes_of("a") != bytes_of("c", seed=8)


def test_a_gemma_2_with_capped_scores_trains_exactly_too(dataset: Dataset, resolved: Any, tmp_path: Path) -> None:
    """Its attention is the eager one, and its logits are capped."""
    make_model("gemma2", tmp_path / "gemma2", sliding_window=16)
    config = resolved("lora", "gemma", max_steps=4, shuffle_dataset=False, logging_steps=1)
    adapted = adapted_model(tmp_path / "gemma2", config)
    state = train(adapted, dataset, config, IDENTITY, tmp_path / "results", Preemption())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma2", dtype=torch.float32, attn_implementation="eager")
    base.requires_grad_(False)
    torch.manual_seed(config.TrainingArguments.seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=sorted(TARGETS["gemma"])))
    assert curve(state) == pytest.approx(list(plain_training(model, config, dataset, 4)), rel=1e-3)


def test_what_an_evaluation_says_is_the_mean_over_all_targets(
    models: dict[str, Path], dataset: Dataset, resolved: Any
) -> None:
    adapted = perturbed(adapted_model(models["gemma"], resolved("lora", "gemma")))
    assert dataset.validation is not None
    for size in (1, 3, 4):
        measured = evaluate(adapted, dataset.validation, Portion(size), stop=lambda: False)
        assert measured is not None
        adapted.peft.eval()
        expected = loss_on(adapted.model, dataset.validation)
        assert (measured.loss, measured.perplexity) == pytest.approx((expected, math.exp(expected)), rel=1e-5)


def test_cross_entropy_is_of_float32_whatever_the_models_type(models: dict[str, Path], dataset: Dataset) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.bfloat16)
    [document, *_] = documents(dataset.train, [0])
    one = Split(*(t[:1] for t in (dataset.train.input_ids, dataset.train.loss_mask, dataset.train.position_ids)),
                lengths=torch.tensor([document.ids.shape[1]]))  # fmt: skip
    with torch.no_grad():
        ours = loss_sum(model, one.batch(torch.tensor([0]), CPU))
        logits = model(input_ids=document.ids).logits[0, :-1].float()
        theirs = functional.cross_entropy(logits, document.labels[0, 1:], reduction="sum", ignore_index=-100)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(theirs), rel=5e-3)
