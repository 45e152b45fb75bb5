"""The report of a run: what it says, and a curve that is well-formed."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from kaito_flows.report import loss_curve, report_markdown

FACTS: dict[str, Any] = {
    "workspace": "w",
    "identity": "i" * 64,
    "reused": False,
    "adapter": {"reference": "oci:/r:latest", "digest": "sha256:1"},
    "metrics": {
        "evaluation": {"before": {"loss": 4.0, "perplexity": 54.6}, "after": {"loss": 2.5, "perplexity": 12.18}},
        "training": {"steps": 2, "trained_tokens": 10_000},
    },
    "history": [
        {"event": "evaluation", "step": 0, "loss": 4.0},
        {"event": "progress", "step": 1, "loss": 3.9},
        {"event": "progress", "step": 2, "loss": 3.0},
        {"event": "evaluation", "step": 2, "loss": 2.5},
    ],
    "answers": {
        "messages": [{"role": "user", "content": "a | b\n<c>"}],
        "base": "x",
        "tuned": "y",
        "expected": "z",
    },
    "service": {"url": "http://127.0.0.1:5000", "models": ["base", "w"]},
    "seconds": {"tune": 1.25},
}


def points(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in lines]


def test_a_loss_that_falls_is_drawn_falling_from_left_to_right() -> None:
    training, held_out = points(loss_curve([(1, 3.9), (2, 3.0)], [(0, 4.0), (2, 2.5)]))
    assert training[0][0] < training[1][0]
    assert training[0][1] < training[1][1], "down in an SVG is a larger y"
    assert held_out[-1][1] > training[-1][1]


def test_a_curve_of_one_point_and_a_flat_one_can_be_drawn() -> None:
    for training in ([(1, 2.0)], [(1, 2.0), (2, 2.0)]):
        assert len(points(loss_curve(training, []))[0]) == len(training)
    assert loss_curve([], []) == ""


def test_the_report_tells_the_proof_the_answers_and_the_service() -> None:
    text = report_markdown(FACTS)
    assert "| held-out loss | 4.000 → **2.500** (-1.500) |" in text
    assert "**a \\| b &lt;c&gt;**" in text
    assert "- tuned model: y\n" in text
    assert "| trained tokens | 10,000 |" in text
    assert "`http://127.0.0.1:5000` serves `base`, `w`." in text
    [encoded] = re.findall(r"base64,([A-Za-z0-9+/=]+)\)", text)
    assert base64.b64decode(encoded).startswith(b"<svg")


def test_the_report_tells_what_rented_nodes_cost_and_nothing_of_nodes_that_cost_nothing() -> None:
    cost = {"usd": 1.47, "gpu_hours": 0.4, "paid_seconds": 1200.0, "boot_seconds": 240.0, "training_share": 0.87}
    paid = report_markdown({**FACTS, "cost": cost})
    said = "1.47 USD, 0.40 GPU hours, 87% of the paid time training, 4m until the nodes were ready"
    assert f"| nodes | {said} |\n" in paid
    assert report_markdown({**FACTS, "cost": {**cost, "usd": 0.0}}) == report_markdown(FACTS)
    assert "| nodes |" not in report_markdown(FACTS)


def test_a_run_that_trained_nothing_says_so() -> None:
    without = {k: v for k, v in FACTS.items() if k not in ("answers", "service")}
    text = report_markdown({**without, "reused": True, "history": []})
    assert "Nothing was trained" in text
    assert "## Loss" not in text


def test_sample_answers_are_shown_side_by_side_and_long_ones_are_cut() -> None:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Define <b>"}]
    sample = {"messages": asked, "base": "many\nwords | more", "tuned": "t" * 1000, "expected": "a letter"}
    text = report_markdown({**FACTS, "samples": [sample]})
    assert "## Sample answers" in text
    assert "**Define &lt;b&gt;**" in text
    assert "- base model: many words \\| more" in text
    assert f"- tuned model: {'t' * 600} …" in text
    assert "- the data: a letter" in text
    assert "## Sample answers" not in report_markdown(FACTS)
