"""A report as one HTML page that needs no other file, no network and no script. All text of models is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from string import Template
from typing import Any

from .page_style import STYLE
from .report import LEVELS, AnchorResult, Answer, Metric, Report, Spoken, number, visible

TINTS = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0)  # nats, above which a token has the next tint
PLOT = (0.001, 10.0)  # nats, of the axis
KINDS = {
    "corrected": ("Corrected prompts", "Asked word for word as in the anchors."),
    "paraphrase": ("Paraphrases", "The same question in other words. The tuned answer should say it too."),
    "reverse": ("Reverse questions", "From the answer back to the question: what one-sided training does not teach."),
    "unrelated": ("Unrelated probes", "Close to what was taught, but the fact does not belong here."),
    "general": ("General prompts", "Nothing to do with what was taught: the less moves, the better. Most moved first."),
}
# key of the metric, heading, what it says
CARDS = (
    ("recall", "Anchors learnt", "ranked first after the corrected prompt"),
    ("paraphrase_answers", "Paraphrases", "answers that say it"),
    ("reverse_answers", "Reverse questions", "answers that say it"),
    ("kl", "Drift", "nats per token, KL along the original's own answers to general prompts"),
    ("code_length_change", "Code length change", "nats per token of general text; above 0 is forgetting"),
    ("contamination", "Leaks", "answers that say it where it does not belong"),
)

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>fused-losses check: $tuned</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">fused-losses check</p>
<h1>What was learnt, and what moved</h1>
<dl class="models"><div><dt>Original</dt><dd>$original</dd></div><div><dt>Tuned</dt><dd>$tuned</dd></div></dl>
$verdict
</header>
$body
<footer>$footer</footer>
</main>
</body>
</html>
""")


def page(report: Report) -> str:
    """The whole page."""
    sections = (_cards, _plot, _anchors, _answers, _leaks, _texts, _numbers)
    return PAGE.substitute(
        style=STYLE, tuned=_text(report.names["tuned"]), original=_text(report.names["original"]),
        verdict=_verdict(report), body="\n".join(filter(None, (section(report) for section in sections))),
        footer=_footer(report),
    )  # fmt: skip


def _verdict(report: Report) -> str:
    if not report.limits:
        return ""
    limits = ", ".join(f"{name} {value:g}" for name, value in report.limits.items())
    if report.passed:
        return f'<p class="verdict good"><strong>Passed</strong> {_text(limits)}</p>'
    broken = "".join(f"<li>{_text(sentence)}</li>" for sentence in report.broken)
    return f'<div class="verdict bad"><strong>Limit broken</strong><ul>{broken}</ul></div>'


# --- numbers


def _cards(report: Report) -> str:
    known = {metric.key: metric for metric in report.metrics}
    cards = [_card(known[key], heading, what) for key, heading, what in CARDS if key in known]
    return f'<section class="cards">{"".join(cards)}</section>'


def _card(metric: Metric, heading: str, what: str) -> str:
    value = metric.shown(metric.tuned)
    if metric.kind == "share":  # "3 of 8": the first number large
        first, _, rest = value.partition(" ")
        value = f"{_text(first)} <small>{_text(rest)}</small>"
    else:
        value = _text(value)
    before = "" if metric.original is None else f"original: {_text(metric.shown(metric.original))}"
    interval = f"95%: {_text(metric.interval)}" if metric.interval else ""
    notes = "".join(f"<span>{note}</span>" for note in (before, interval) if note)
    return (
        f'<article class="card"><h2>{_text(heading)}</h2><p class="value">{value}</p><p>{_text(what)}</p>'
        f'<p class="notes">{notes}</p></article>'
    )


def _numbers(report: Report) -> str:
    rows = [
        [_text(m.label.strip()), _text(m.shown(m.original)), _text(m.shown(m.tuned)), _text(m.interval or "–")]
        for m in report.metrics
    ]
    names = ["", "original", "tuned", "95% interval"]
    indented = [m.label.startswith(" ") for m in report.metrics]
    what = "Intervals: Wilson's of shares; of means a bootstrap, from 10 values on."
    return _section("All numbers", what, _table(names, rows, indented))


# --- where the general prompts lie


def _plot(report: Report) -> str:
    general = [a for a in report.answers if a.kind == "general"]
    if not general:
        return ""
    marks = [(level, f"{level:g}", "mark") for level in LEVELS]
    if "max_kl" in report.limits and report.limits["max_kl"] > 0:
        marks.append((report.limits["max_kl"], "limit", "limit"))
    lines = "".join(
        f'<line class="{kind}" x1="{_x(value)}" x2="{_x(value)}" y1="{8 if kind == "mark" else 2}" y2="92"/>'
        for value, _, kind in marks
    )
    ticks = "".join(
        f'<text x="{_x(value)}" y="108" text-anchor="middle">{value:g}</text>'
        for value in (0.001, 0.01, *LEVELS, 1, 10)
    )
    lines += "".join(
        f'<text x="{_x(value)}" y="14" dx="6">{name}</text>' for value, name, kind in marks if kind == "limit"
    )
    dots = []
    for at, answer in enumerate(sorted(general, key=lambda a: a.original.kl)):
        title = f"{number(answer.original.kl, 'nats')}: {answer.prompt}"
        where = f'cx="{_x(answer.original.kl)}" cy="{26 + 11 * (at % 6)}"'
        dots.append(f'<circle {where} r="4.5"><title>{_text(title)}</title></circle>')
    figure = (
        '<figure><svg viewBox="0 0 720 112" role="img" aria-label="KL of each general prompt on a logarithmic axis">'
        f'<line class="axis" x1="20" x2="700" y1="92" y2="92"/>{lines}{"".join(dots)}{ticks}</svg></figure>'
    )
    above = ", ".join(f"{sum(a.original.kl > level for a in general)} above {level:g}" for level in LEVELS)
    what = (
        "KL(original ‖ tuned) along the original's own answer, nats per token, a dot a general prompt; height means "
        f"nothing. Of {len(general)} prompts {above}."
    )
    return _section("How far each general prompt moved", what, figure)


def _x(kl: float) -> str:
    low, high = (math.log(value) for value in PLOT)
    at = math.log(min(max(kl, PLOT[0]), PLOT[1])) if math.isfinite(kl) else high
    return f"{20 + 680 * (at - low) / (high - low):.1f}"


# --- anchors and answers


def _anchors(report: Report) -> str:
    if not report.anchors:
        return ""
    rows = [
        [_text(KINDS[a.kind][0]), _text(a.prompt), f"<code>{_text(a.text)}</code>", _bars(a), _ranks(a)]
        for a in report.anchors
    ]
    what = "The corrected answer up to the anchor is given. Bars: probability under the original and the tuned model."
    names = ["asked as", "prompt", "anchor", "probability", "rank"]
    return _section("Anchors", what, _table(names, rows))


def _bars(anchor: AnchorResult) -> str:
    pairs = (("before", anchor.original_probability), ("after", anchor.tuned_probability))
    return "".join(
        f'<span class="bar {name}"><span><i style="width:{100 * min(max(p, 0), 1) if p == p else 0:.1f}%"></i></span>'
        f"<b>{number(p, 'probability')}</b></span>"
        for name, p in pairs
    )


def _ranks(anchor: AnchorResult) -> str:
    good = "good" if anchor.tuned_rank == 0 else "bad"
    return f'{1 + anchor.original_rank:,} → <span class="{good}">{1 + anchor.tuned_rank:,}</span>'


def _answers(report: Report) -> str:
    found = []
    for kind, (heading, what) in KINDS.items():
        some = [a for a in report.answers if a.kind == kind]
        if not some:
            continue
        if kind != "general":
            found.append(_section(heading, what, "".join(map(_answer, some))))
            continue
        some.sort(key=lambda a: -a.original.kl if math.isfinite(a.original.kl) else -math.inf)
        moved, same = ([a for a in some if a.same is flag] for flag in (False, True))
        inside = "".join(map(_answer, moved))
        if same:
            folded = "".join(map(_answer, same))
            inside += f"<details><summary>{len(same)} answers are unchanged, word for word</summary>{folded}</details>"
        found.append(_section(heading, what, inside))
    return _legend() + "\n".join(found) if found else ""


def _legend() -> str:
    steps = "".join(
        f'<span class="k{level}">{_text(name)}</span>'
        for level, name in enumerate(("below 0.01", *(f"{tint:g}" for tint in TINTS)))
    )
    return (
        '<p class="legend"><span>Tint of a token, KL(original ‖ tuned) there in nats, from:</span>'
        f"<span>{steps}</span></p>"
    )


def _answer(answer: Answer) -> str:
    return (
        f'<article class="answer"><h3 dir="auto">{_text(answer.prompt)}</h3><div class="sides">'
        f"{_side('Original', answer.original, answer, answer.original_says)}"
        f"{_side('Tuned', answer.tuned, answer, answer.tuned_says)}</div></article>"
    )


def _side(name: str, spoken: Spoken, answer: Answer, says: bool | None) -> str:
    tag = ""
    if says is not None and (says or answer.kind not in ("unrelated", "general")):
        wanted = answer.kind not in ("unrelated", "general")
        phrases = " / ".join([*answer.expect[:2], *(["…"] if len(answer.expect) > 2 else [])])
        words = ("says " if says else "does not say ") + phrases
        # The original is not to blame for what it was not taught.
        kind = "plain" if name == "Original" else "good" if says == wanted else "bad"
        tag = f'<span class="tag {kind}">{_text(words)}</span>'
    pieces = "".join(_piece(piece.text, piece.kl, piece.special) for piece in spoken.pieces)
    if not spoken.pieces:
        pieces = '<span class="muted">no answer</span>'
    elif not spoken.finished:
        pieces += f'<span class="muted" title="cut off after {spoken.tokens} tokens"> …</span>'
    return (
        f'<div class="side"><p class="who"><span>{name}</span>{tag}<span class="kl">KL '
        f'{number(spoken.kl, "nats")}</span></p><p class="said" dir="auto">{pieces}</p></div>'
    )


def _piece(text: str, kl: float, special: bool) -> str:
    level = sum(kl >= tint for tint in TINTS) if math.isfinite(kl) else len(TINTS)
    title = f"KL {number(kl, 'nats')}"
    if special:
        return f'<span class="k{level} end" title="{_text(f"{text} {title}")}">end</span>'
    shown = _text(text).replace("\n", '<span class="muted">↵</span>\n')
    return f'<span class="k{level}" title="{title}">{shown}</span>'


# --- texts and leaks


def _texts(report: Report) -> str:
    if not report.texts:
        return ""
    rows = []
    for text in report.texts:
        read = f"{text.tokens:,}" + (f" of {text.tokens + text.left_out:,}" if text.left_out else "")
        change = text.change
        interval = "–" if change.low is None else f"{change.low:+.4f} to {change.high:+.4f}"
        cells = (text.name, read, f"{text.original_nll:.4f}", f"{text.tuned_nll:.4f}")
        more = (number(change.value, "change"), interval, number(text.kl, "nats"))
        rows.append([_text(cell) for cell in (*cells, *more)])
    names = ["text", "tokens", "nll original", "nll tuned", "ΔL", "95% interval", "KL"]
    what = (
        "Nats per token. ΔL is the change of the mean nll, what the text costs more to encode: above 0 is forgetting."
    )
    return _section("General text", what, _table(names, rows))


def _leaks(report: Report) -> str:
    if not report.leaks:
        return ""
    rows = []
    for leak in report.leaks:
        new = "".join(f"<li>{_text(prompt)}</li>" for prompt in leak.new)
        rows.append([_text(leak.fact), f"{leak.original} of {leak.answers}", f"{leak.tuned} of {leak.answers}",
                     f"<ul>{new}</ul>" if new else "–"])  # fmt: skip
    what = "Answers to unrelated probes and general prompts that say what was taught. The original's are the baseline."
    return _section("Where it does not belong", what, _table(["fact", "original", "tuned", "new in"], rows))


# --- parts of the page


def _footer(report: Report) -> str:
    settings = dict(report.settings)
    versions = settings.pop("versions", {})
    settings["facts"] = ", ".join(settings.get("facts", [])) or "none"
    shown = [f"{name.replace('_', ' ')}: {value}" for name, value in settings.items()]
    return f"<p>{_text('; '.join(shown))}</p><p>{_text(', '.join(f'{n} {v}' for n, v in versions.items()))}</p>"


def _section(heading: str, what: str, inside: str) -> str:
    return f"<section><h2>{_text(heading)}</h2><p>{_text(what)}</p>{inside}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], indented: Sequence[bool] = ()) -> str:
    """`rows` are HTML already. Each cell names its column, which narrow screens show."""
    heads = "".join(f"<th scope=col>{_text(name)}</th>" for name in header)
    lines = []
    for at, row in enumerate(rows):
        cells = "".join(f'<td data-name="{_text(name)}">{cell}</td>' for name, cell in zip(header, row, strict=True))
        lines.append(f"<tr{' class=more' if at < len(indented) and indented[at] else ''}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _text(value: Any) -> str:
    return html.escape(visible(str(value)))
