"""The tables of docs/method.md about larger vocabularies, from results/enlarged.json."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sparse_states import PICTURES

SCANS = ("full", "int8")


def fill(content: dict) -> None:
    """Puts each table between its marks."""
    path = PICTURES / "method.md"
    text = path.read_text()
    for name, lines in (("validate", validated), ("larger", enlarged), ("mend", mended)):
        if name in content:
            table = "\n".join(lines(content[name]))
            mark = rf"(<!-- enlarged: {name} -->\n).*?(<!-- end -->)"
            text, found = re.subn(mark, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
            if found != 1:
                raise SystemExit(f"docs/method.md: expected the marks of {name!r} once, found them {found} times")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def figures(case: dict) -> Iterator[list[float]]:
    """Entropy, entries, tail, then dx and dW of each loss and scan; no KL where there is no reference."""
    losses = case["losses"]
    yield [case["statistics"]["entropy"]]
    yield [losses["cross-entropy"]["full"]["entries"]]
    yield [case["statistics"]["tail"]]
    for scan in SCANS:
        for loss in ("cross-entropy", "TALR", "KL"):
            yield losses[loss][scan]["errors"] if loss in losses else []


def validated(cases: dict) -> Iterator[str]:
    """The real figures, then how far the enlarged ones are from them in per cent."""
    losses = " | ".join(f"{loss}, {scan}" for scan in SCANS for loss in ("cross-entropy", "TALR", "KL"))
    yield f"| text | head | entropy | entries | tail | {losses} |"
    yield "|---" * 11 + "|"
    for name, case in cases.items():
        kind, head = name.split(", ")
        if head != "real":
            continue
        real = list(figures(case))
        shown = [
            f"{real[0][0]:.2f}",
            f"{real[1][0]:.0f}",
            f"{real[2][0]:.4f}",
            *(percent(pair, 2) for pair in real[3:]),
        ]
        yield "| " + " | ".join([kind, "real", *shown]) + " |"
        for other, found in cases.items():
            if other.startswith(f"{kind}, ") and other != name:
                pairs = [
                    " / ".join(f"{100 * (b / a - 1):+.0f}" for a, b in zip(one, two, strict=True)) or "–"
                    for one, two in zip(real, figures(found), strict=True)
                ]
                yield "| " + " | ".join([kind, other.split(", ")[1], *pairs]) + " |"


def enlarged(cases: dict) -> Iterator[str]:
    yield (
        "| V | text | added rows | loss | entries | exact tokens | full, dx / dW | int8, dx / dW | plain bf16 | "
        "certified, full | certified, int8 | nll, int8 | nll, bf16 logits |"
    )
    yield "|---" * 13 + "|"
    for name, case in sorted(cases.items(), key=lambda item: order(item[0])):
        for loss, row in case["losses"].items():
            full, eighth = (row[scan] for scan in SCANS)
            cells = [
                *heading(name, loss, full["kl"]), f"{full['entries']:.0f}", f"{full['exact_tokens']} of {case['N']}",
                *(percent(row[which]["errors"], 2) for which in (*SCANS, "plain")),
                percent(full["certified"], 1), percent(eighth["certified"], 1),
                *(f"{row[which]['nll'][0]:.4f} / {row[which]['nll'][1]:.3f}" for which in ("int8", "plain")),
            ]  # fmt: skip
            yield "| " + " | ".join(cells) + " |"


def mended(cases: dict) -> Iterator[str]:
    yield (
        "| V | text | added rows | loss | times θ | entries | exact tokens | full, dx / dW | int8, dx / dW | "
        "certified, full | certified, int8 |"
    )
    yield "|---" * 11 + "|"
    for name, case in sorted(cases.items(), key=lambda item: order(item[0])):
        for loss, row in case["losses"].items():
            for factor in sorted({key.split()[1] for key in row if " " in key}, reverse=True):
                full, eighth = (row[f"{scan} {factor}"] for scan in SCANS)
                cells = [
                    *heading(name, loss, full["kl"]), factor, f"{full['entries']:.0f}",
                    f"{full['exact_tokens']} of {case['N']}",
                    percent(full["errors"], 2), percent(eighth["errors"], 2),
                    percent(full["certified"], 1), percent(eighth["certified"], 1),
                ]  # fmt: skip
                yield "| " + " | ".join(cells) + " |"


def order(name: str) -> tuple[str, float, int]:
    kind, vocabulary, exponent = name.split(", ")
    return kind, -float(exponent), int(vocabulary)


def heading(name: str, loss: str, kl: float | None) -> list[str]:
    kind, vocabulary, exponent = name.split(", ")
    size = int(vocabulary)
    added = "–" if size < 50000 else "alike" if exponent == "0" else "rarer"
    return [f"{size:,}", kind, added, loss if kl is None else f"{loss} {kl:.4f}"]


def percent(pair: list[float | None], digits: int) -> str:
    return " / ".join("–" if value is None else f"{100 * value:.{digits}f}" for value in pair) or "–"
