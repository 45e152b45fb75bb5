from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from kaito_flows.dataset import DatasetParameters, PreparedDataset, SourceFile, dataset_key, fetch, prepare_dataset
from kaito_flows.dataset.prepare import KEY_ANNOTATION
from kaito_flows.errors import ConfigError, DatasetError, ImageError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import extract, open_image, open_repository, read_file
from kaito_flows.oci.layout import Layout

PARAMETERS = DatasetParameters(max_length=64, seed=7, train_share=0.9)


@pytest.fixture
def sources(source: Any, say: Any) -> list[SourceFile]:
    first = [say(f"What is {n}?", f"a tower {n}", system="Be brief.") for n in range(60)]
    second = [say(f"Define {n}.", f"light {n}", "Why?", "no") for n in range(40)]
    return [source({"messages": first}, "one.parquet"), source({"messages": second}, "two.parquet")]


@pytest.fixture
def prepare(sources: list[SourceFile], model_folder: Any, tmp_path: Path) -> Any:
    folder = model_folder()

    def run(
        parameters: DatasetParameters = PARAMETERS, given: Any = None, layout: str = "layout", folder: Path = folder
    ) -> PreparedDataset:
        return prepare_dataset(given or sources, folder, parameters, Layout(tmp_path / layout))

    return run


def refused(prepare: Any, *arguments: Any, **options: Any) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        prepare(*arguments, **options)
    return caught.value


def test_the_image_holds_what_the_tuner_reads(prepare: Any, tmp_path: Path, sources: list[SourceFile]) -> None:
    made = prepare()
    extract(open_image(made.image.reference), tmp_path / "out")
    data = tmp_path / "out" / "data"
    assert sorted(path.name for path in data.iterdir()) == [
        "dataset.json", "report.md", "samples.json", "train.safetensors", "validation.safetensors",
    ]  # fmt: skip
    facts = json.loads((data / "dataset.json").read_text())
    assert facts == made.facts
    for name in ("train", "validation"):
        tensors = safetensors.numpy.load_file(data / f"{name}.safetensors")
        assert {key: value.dtype for key, value in tensors.items()} == {
            "input_ids": np.int32, "loss_mask": np.uint8, "position_ids": np.int32,
        }  # fmt: skip
        split = facts["splits"][name]
        assert {value.shape for value in tensors.values()} == {(split["rows"], 64)}
        assert tensors["loss_mask"].sum() == split["trained_tokens"]
    assert {key: facts[key] for key in ("format_version", "sequence_length", "truncated_documents")} == {
        "format_version": 1, "sequence_length": 64, "truncated_documents": 0,
    }  # fmt: skip
    assert facts["splits"]["train"]["documents"] == 90
    assert facts["splits"]["validation"]["documents"] == 10
    assert [(s["url"], s["rows"], s["sha256"], s["bytes"]) for s in facts["sources"]] == [
        ("file:one.parquet", 60, sources[0].sha256, sources[0].bytes),
        ("file:two.parquet", 40, sources[1].sha256, sources[1].bytes),
    ]
    assert facts["tokenizer"].startswith("sha256:")
    assert facts["preparation"]["seed"] == 7


def test_the_tag_and_annotation_name_the_key(prepare: Any, tmp_path: Path) -> None:
    made = prepare()
    key = made.image.annotations[KEY_ANNOTATION]
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert Layout(tmp_path / "layout").tags() == {f"dataset-{key[:12]}": made.image.digest}
    assert dict(made.image.annotations) == {"io.kaito-flows.dataset-key": key}


def test_samples_are_held_out_chats(prepare: Any, tmp_path: Path) -> None:
    made = prepare()
    samples = json.loads(read_file(made.image, "data/samples.json"))
    assert len(samples) == 3
    assert {tuple(sample) for sample in samples} == {("answer", "messages")}
    train = safetensors.numpy.load(read_file(made.image, "data/train.safetensors"))
    validation = safetensors.numpy.load(read_file(made.image, "data/validation.safetensors"))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    trained, held = (tokenizer.decode(t["input_ids"].ravel().tolist()) for t in (train, validation))
    for sample in samples:
        question = sample["messages"][-1 if len(sample["messages"]) < 3 else 0]["content"]
        assert question in held
        assert question not in trained


def test_nothing_is_made_twice(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare()
    monkeypatch.setattr("kaito_flows.dataset.prepare.read_chats", None)
    again = prepare()
    assert (made.reused, again.reused) == (False, True)
    assert (again.image.digest, again.facts) == (made.image.digest, made.facts)


def test_an_image_that_lost_a_layer_is_made_again(prepare: Any) -> None:
    made = prepare()
    layers = made.image.repository.manifest(made.image.digest)["layers"]
    made.image.repository.blob_path(layers[0]["digest"]).unlink()
    again = prepare()
    assert (again.reused, again.image.digest) == (False, made.image.digest)
    assert read_file(again.image, "data/dataset.json")


def test_a_tag_that_another_key_shares_is_not_trusted(prepare: Any) -> None:
    made = prepare()
    other = prepare(replace(PARAMETERS, seed=8))
    layout = made.image.repository
    tag = f"dataset-{made.image.annotations[KEY_ANNOTATION][:12]}"
    manifest = layout.manifest(other.image.digest)
    layout.tag(tag, layout.put_manifest(manifest))
    again = prepare()
    assert (again.reused, again.image.digest) == (False, made.image.digest)


def test_other_folders_and_processes_give_the_same_digest(
    prepare: Any, sources: list[SourceFile], tmp_path: Path
) -> None:
    made = prepare()
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "model", elsewhere / "m")
    for file in sources:
        shutil.copy(file.path, elsewhere)
    code = (
        "import sys; from pathlib import Path; from kaito_flows.oci.layout import Layout\n"
        "from kaito_flows.dataset import DatasetParameters, fetch, prepare_dataset\n"
        "here = Path(sys.argv[1])\n"
        "files = fetch([(here / n).as_uri() for n in ('one.parquet', 'two.parquet')], here / 'c', allow_files=True)\n"
        "p = DatasetParameters(max_length=64, seed=7, train_share=0.9)\n"
        "sys.stdout.write(prepare_dataset(files, here / 'm', p, Layout(here / 'l')).image.digest)\n"
    )
    for seed in ("0", "1"):
        shutil.rmtree(elsewhere / "l", ignore_errors=True)
        command = [sys.executable, "-c", code, str(elsewhere)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed})
        assert done.stdout == made.image.digest


def test_everything_that_matters_changes_the_key(sources: list[SourceFile]) -> None:
    keys = [dataset_key(sources, "sha256:a", PARAMETERS), dataset_key(sources, "sha256:b", PARAMETERS)]
    keys.append(dataset_key(sources[::-1], "sha256:a", PARAMETERS))
    keys.append(dataset_key([replace(sources[0], sha256="0" * 64), sources[1]], "sha256:a", PARAMETERS))
    for change in (
        {"max_length": 65}, {"packing": False}, {"shuffle": False}, {"seed": 8}, {"train_share": 0.8},
        {"messages_column": "m"}, {"context_column": "c"}, {"response_column": "r"},
    ):  # fmt: skip
        keys.append(dataset_key(sources, "sha256:a", replace(PARAMETERS, **change)))
    assert len(set(keys)) == len(keys)
    moved = [replace(file, url="file:///elsewhere/" + file.url.rpartition("/")[2]) for file in sources]
    assert dataset_key(moved, "sha256:a", PARAMETERS) == keys[0]


def test_every_file_is_used_and_none_of_their_secrets(site: Any, prepare: Any, say: Any, tmp_path: Path) -> None:
    def parquet(text: str) -> bytes:
        pq.write_table(
            pa.table({"messages": [say(f"What is {text}?", f"{text} {n}") for n in range(5)]}), tmp_path / "p"
        )
        return (tmp_path / "p").read_bytes()

    urls = [site.add(f"/{name}/data.parquet?sig=hunter2", parquet(name)) for name in ("one", "two", "three")]
    made = prepare(given=fetch(urls, tmp_path / "cache", allow_files=False))
    assert [s["rows"] for s in made.facts["sources"]] == [5, 5, 5]
    blobs = b"".join(path.read_bytes() for path in (tmp_path / "layout").rglob("*") if path.is_file())
    assert b"hunter2" not in blobs
    assert str(tmp_path).encode() not in blobs


def test_nothing_held_out_leaves_out_the_split_and_shows_training_samples(prepare: Any) -> None:
    made = prepare(replace(PARAMETERS, train_share=1))
    assert list(made.facts["splits"]) == ["train"]
    assert len(json.loads(read_file(made.image, "data/samples.json"))) == 3
    assert "Nothing is held out" in read_file(made.image, "data/report.md").decode()
    with pytest.raises(ImageError):
        read_file(made.image, "data/validation.safetensors")


def test_long_chats_are_cut_and_those_without_an_answer_left_are_dropped(prepare: Any, source: Any, say: Any) -> None:
    rows = [say("Hi", "yes " * 100), say("What " * 100, "no"), say("Hi", "yes"), say("Hi", "no")]
    made = prepare(replace(PARAMETERS, train_share=1), given=[source({"messages": rows})])
    assert (made.facts["truncated_documents"], made.facts["dropped_documents"]) == (1, 1)
    assert made.facts["splits"]["train"]["documents"] == 3
    report = read_file(made.image, "data/report.md").decode()
    assert "1 of 4 chats were cut off at 64 tokens" in report
    assert "1 of 4 chats were left out" in report
    error = refused(prepare, given=[source({"messages": [rows[1]]})])
    assert error.code == "dataset-too-long"


def test_the_report_shows_what_is_learned_and_lets_no_markup_through(prepare: Any, source: Any, say: Any) -> None:
    nasty = "<script>alert(1)</script> [x](javascript:y) | **no** `code`\n# head\n\n---"
    rows = [say(nasty, f"{nasty} {n}") for n in range(3)]
    made = prepare(
        replace(PARAMETERS, shuffle=False, train_share=1, max_length=512), given=[source({"messages": rows})]
    )
    report = read_file(made.image, "data/report.md").decode()
    example = report.partition("## What is learned")[2]
    assert "<script>" not in report
    assert "](javascript" not in report
    assert (
        "**&lt;script&gt;alert\\(1\\)&lt;/script&gt; \\[x\\]\\(javascript:y\\) \\| \\*\\*no\\*\\* \\`code\\`**"
        in example
    )
    assert "**\\# head**" in example
    assert "**\\-\\-\\- 0&lt;\\|im\\_end\\|&gt;**" in example
    assert example.count("script&gt;") == 4
    assert all(line.startswith(">") or not line for line in example.split("learned.\n")[1].splitlines())


def test_the_report_has_its_tables(prepare: Any) -> None:
    report = read_file(prepare().image, "data/report.md").decode()
    for text in ("| file:one.parquet |", "| train | 90 |", "| validation | 10 |", "33 to 64", "█", "Median"):
        assert text in report


def test_duplicates_unplaced_answers_and_folded_systems_are_told(
    prepare: Any, source: Any, say: Any, model_folder: Any, templates: dict[str, str]
) -> None:
    rows = [say("a", "yes", "b", "no", system="Be brief.")] * 3 + [say("a", "no")]
    for name, unplaced, folded in (("mistral3", 3, False), ("gemma", 0, True)):
        folder = model_folder(templates[name], name=name)
        made = prepare(replace(PARAMETERS, train_share=0.5), given=[source({"messages": rows})], folder=folder)
        assert made.facts["duplicate_documents"] == 2
        assert (made.facts["unlearned_turns"], made.facts["system_folded"]) == (unplaced, folded)
        samples = json.loads(read_file(made.image, "data/samples.json"))
        report = read_file(made.image, "data/report.md").decode()
        assert ("no system role" in report, "are not learned" in report) == (folded, bool(unplaced))
        if folded:
            assert "system" not in {m["role"] for sample in samples for m in sample["messages"]}


def test_a_chat_that_the_template_refuses_is_named(
    prepare: Any, source: Any, say: Any, model_folder: Any, templates: dict[str, str]
) -> None:
    folder = model_folder(templates["llama2"], name="llama2")
    file = source({"messages": [say("a", "b"), say("a") + say("b", "c")]})
    error = refused(prepare, given=[file], folder=folder)
    assert error.code == "dataset-row"
    assert error.place.endswith("data.bin: row 2")
    assert "roles must alternate" in error.message
    broken = model_folder("{{ messages[-1].content }}{{ '?' if add_generation_prompt }}", name="broken")
    assert refused(prepare, given=[file], folder=broken).code == "chat-template"


def test_a_file_that_changes_meanwhile_is_refused(prepare: Any, sources: list[SourceFile], say: Any) -> None:
    pq.write_table(pa.table({"messages": [say("a", "b")]}), sources[1].path)
    assert refused(prepare).code == "dataset-changed"


def test_no_files_are_refused(model_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        prepare_dataset([], model_folder(), PARAMETERS, Layout(tmp_path / "layout"))
    assert caught.value.code == "dataset-empty"


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError) as caught:
        DatasetParameters(max_length=64, train_share=share)
    assert caught.value.place == "DatasetConfig.train_test_split"


def test_parameters_come_from_the_resolved_training_config() -> None:
    from kaito_flows.workspace.training_config import TrainingConfig

    data = "DatasetConfig: {train_test_split: 0.93, messages_column: chat}"
    text = f"training_config: {{{data}, TrainingArguments: {{max_length: 512}}}}"
    parameters = DatasetParameters.from_config(TrainingConfig.resolve("qlora", text).model_dump())
    assert (parameters.max_length, parameters.train_share, parameters.messages_column) == (512, 0.93, "chat")


@pytest.mark.registry
def test_a_registry_gets_the_image_that_a_folder_gets_and_it_is_found_there(
    registry: Any, prepare: Any, sources: list[SourceFile], tmp_path: Path
) -> None:
    credentials = Credentials.from_dockerconfig(registry.dockerconfig)
    repository = open_repository(f"docker://{registry.host}/team/datasets", credentials)
    made = prepare_dataset(sources, tmp_path / "model", PARAMETERS, repository)
    assert (made.reused, made.image.digest) == (False, prepare().image.digest)
    again = prepare_dataset(sources, tmp_path / "model", PARAMETERS, repository)
    assert (again.reused, again.image.digest, again.facts) == (True, made.image.digest, made.facts)
