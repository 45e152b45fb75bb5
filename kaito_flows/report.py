"""The report of a run: Markdown with the loss curve drawn inside, as an SVG in a data URL."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kaito_flows.workspace.status import cost_words

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 260, 48, 34, 14, 14
LONGEST_SAMPLE = 600
TRAIN_COLOUR, HELD_OUT_COLOUR = "#2563eb", "#ea580c"


def loss_curve(training: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> str:
    """Draw (step, loss) points as an SVG: training as a line, evaluations as dots joined by a dashed line."""
    points = [*training, *held_out]
    if not points:
        return ""
    last = max(1, *(step for step, _ in points))
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    low, high = low - 0.05 * (high - low or 1.0), high + 0.05 * (high - low or 1.0)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    def line(values: Sequence[tuple[int, float]], colour: str, extra: str = "") -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in values)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" {extra}/>'

    marks = [low + (high - low) * i / 4 for i in range(5)]
    grid = "".join(
        f'<line x1="{LEFT}" y1="{y(m):.1f}" x2="{WIDTH - RIGHT}" y2="{y(m):.1f}" stroke="#8884"/>'
        f'<text x="{LEFT - 6}" y="{y(m) + 4:.1f}" text-anchor="end">{m:.2f}</text>'
        for m in marks
    )
    ticks = "".join(
        f'<text x="{x(last * i / 4):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{round(last * i / 4)}</text>'
        for i in range(5)
    )
    dots = "".join(f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="4" fill="{HELD_OUT_COLOUR}"/>' for s, v in held_out)
    legend = (
        f'<text x="{WIDTH - RIGHT}" y="{TOP + 12}" text-anchor="end" fill="{TRAIN_COLOUR}">training loss</text>'
        f'<text x="{WIDTH - RIGHT}" y="{TOP + 28}" text-anchor="end" fill="{HELD_OUT_COLOUR}">held-out loss</text>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}" text-anchor="middle">step</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#777">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{grid}{ticks}{line(training, TRAIN_COLOUR)}'
        f"{line(held_out, HELD_OUT_COLOUR, 'stroke-dasharray=' + chr(34) + '5 4' + chr(34))}{dots}{legend}</svg>"
    )


def report_markdown(facts: Mapping[str, Any]) -> str:
    """Write the report of a run from the facts that the flow returns."""
    adapter, history = facts["adapter"], facts["history"]
    training = [(int(e["step"]), float(e["loss"])) for e in history if e["event"] == "progress"]
    held_out = [(int(e["step"]), float(e["loss"])) for e in history if e["event"] == "evaluation"]
    before, after = (facts["metrics"]["evaluation"].get(key) for key in ("before", "after"))
    lines = [f"# {facts['workspace']}", ""]
    if facts["reused"]:
        lines += ["Nothing was trained: an adapter with the same inputs was there already.", ""]
    lines += ["| | result |", "|---|---|"]
    lines += [f"| image | `{adapter['reference']}` |", f"| digest | `{adapter['digest']}` |"]
    if before and after:
        change = after["loss"] - before["loss"]
        lines.append(f"| held-out loss | {before['loss']:.3f} → **{after['loss']:.3f}** ({change:+.3f}) |")
        lines.append(f"| held-out perplexity | {before['perplexity']:.2f} → **{after['perplexity']:.2f}** |")
    lines += [f"| {_words(key)} | {_number(value)} |" for key, value in facts["metrics"]["training"].items()]
    if (cost := facts.get("cost")) and cost["usd"] != 0:
        lines.append(f"| nodes | {cost_words(cost)} |")
    lines += [f"| run identity | `{facts['identity']}` |", ""]
    if svg := loss_curve(training, held_out):
        encoded = base64.b64encode(svg.encode()).decode()
        lines += ["## Loss", "", f"![loss by step](data:image/svg+xml;base64,{encoded})", ""]
    if answers := facts.get("answers"):
        asked = " / ".join(_cell(m["content"]) for m in answers["messages"] if m["role"] == "user")
        lines += ["## The same prompt, before and after", "", f"**{asked}**", ""]
        lines += [f"- {who}: {_cell(answers[key])}" for who, key in _ANSWERS]
        lines.append("")
    if samples := facts.get("samples"):
        lines += ["## Sample answers, before and after training", ""]
        for sample in samples:
            asked = " / ".join(_cell(m["content"]) for m in sample["messages"] if m["role"] == "user")
            lines += [f"**{_cut(asked)}**", "", *(f"- {who}: {_cut(_cell(sample[key]))}" for who, key in _ANSWERS), ""]
    if service := facts.get("service"):
        lines += ["## Service", "", f"`{service['url']}` serves {', '.join(f'`{m}`' for m in service['models'])}.", ""]
    lines += ["## Time", "", "| stage | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in facts["seconds"].items()]
    return "\n".join(lines) + "\n"


_ANSWERS = (("base model", "base"), ("tuned model", "tuned"), ("the data", "expected"))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} …"


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else f"{value:.4g}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _cell(text: str) -> str:
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")
