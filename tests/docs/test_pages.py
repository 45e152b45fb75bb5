"""The pages for users, held against what they speak of: settings and their defaults, errors' codes, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kaito_flows.settings import Settings

PREFIX = "KAITO_FLOWS_"
SETTINGS = {(PREFIX + name).upper(): field for name, field in Settings.model_fields.items()}
# Read by the command line itself, and by the watcher's options.
OTHERS = {"KAITO_FLOWS_TRACEBACK", "KAITO_FLOWS_TUNE_DEPLOYMENT", "KAITO_FLOWS_SERVE_DEPLOYMENT"}
# Read by tests and benchmarks alone, and spoken of there.
OF_TESTS = {"KAITO_FLOWS_TEST_HOST", "KAITO_FLOWS_TEST_TAG"}
ROW = re.compile(r"^\| `(KAITO_FLOWS_\w+)` \| *(.*?) *\| .*\|$", re.MULTILINE)


@pytest.fixture(scope="module")
def pages(repository_root: Path) -> dict[str, str]:
    """What users read, by path."""
    found = [repository_root / "README.md", *sorted((repository_root / "docs").glob("*.md"))]
    return {str(path.relative_to(repository_root)): path.read_text() for path in found}


def test_every_setting_is_described_and_every_variable_that_is_described_is_one(pages: dict[str, str]) -> None:
    described = {name for text in pages.values() for name in re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", text)}
    assert sorted(SETTINGS.keys() - described) == []
    assert sorted(described - SETTINGS.keys() - OTHERS) == []


def test_variables_that_are_no_settings_are_read_somewhere(repository_root: Path) -> None:
    code = "".join(path.read_text() for path in (repository_root / "kaito_flows" / "cli").glob("*.py"))
    assert [name for name in sorted(OTHERS) if f'"{name}"' not in code] == []


def test_no_variable_in_other_pages_is_one_that_nobody_reads(repository_root: Path) -> None:
    for path in (*(repository_root / "benchmarks").glob("*.md"), repository_root / "CONTRIBUTING.md"):
        named = set(re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", path.read_text()))
        assert named <= SETTINGS.keys() | OTHERS | OF_TESTS, path.name


def test_the_tables_of_settings_hold_each_once_with_its_default(pages: dict[str, str]) -> None:
    rows: list[tuple[str, str]] = []
    for text in pages.values():
        for table in re.findall(r"^\| variable \| default \|.*?(?=^(?!\|))", text, re.MULTILINE | re.DOTALL):
            rows += ROW.findall(table)
    assert {name: default.strip("`") for name, default in rows} == {
        name: _written(SETTINGS[name].default) for name, _ in rows
    }
    assert len(rows) == len(dict(rows))
    # Of one machine, in prose: where it is, and its service's address.
    assert SETTINGS.keys() - dict(rows) == {"KAITO_FLOWS_HOME", "KAITO_FLOWS_SERVE_HOST", "KAITO_FLOWS_SERVE_PORT"}


def _written(default: object) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default is None else str(default)


def test_every_code_of_the_tables_is_one_that_is_raised(pages: dict[str, str], repository_root: Path) -> None:
    folders = ("kaito_flows", "tasks", "flows")
    code = "".join(path.read_text() for name in folders for path in (repository_root / name).rglob("*.py"))
    for page in ("docs/nodes.md", "docs/karpenter.md"):
        [table] = re.findall(r"^\| code \|.*?(?=^(?!\|))", pages[page] + "\n", re.MULTILINE | re.DOTALL)
        codes = {name for row in table.splitlines()[2:] for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])}
        assert len(codes) >= 8
        assert [name for name in sorted(codes) if f'"{name}"' not in code] == []


def test_links_between_the_pages_lead_somewhere(pages: dict[str, str], repository_root: Path) -> None:
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (repository_root / page).parent / path if path else repository_root / page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
                assert anchor in map(_anchor, headings), f"{page}: {target}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
