"""Questions on clinical calculations over random patients, answered by the calculators of medcalc-bench."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..texts import _package


@dataclass(frozen=True)
class Calculator:
    """A module of medcalc with its function; `inputs`: what it takes; `facts`: the same in words."""

    function: str
    quantity: str
    unit: str
    inputs: Callable[[dict], dict]
    facts: str


def _labs(**names: str) -> Callable[[dict], dict]:
    """Inputs that are values of the patient: name="value unit"."""
    return lambda p: {name: (p[text.split()[0]], text.partition(" ")[2]) for name, text in names.items()}


TRAINED = {
    "bmi_calculator": Calculator(
        "bmi_calculator_explanation", "body mass index", "kg/m^2", _labs(weight="weight kg", height="height cm"),
        "weighs {weight} kg and is {height} cm tall",
    ),
    "mean_arterial_pressure": Calculator(
        "mean_arterial_pressure_explanation", "mean arterial pressure", "mm Hg",
        _labs(sys_bp="systolic mm Hg", dia_bp="diastolic mm Hg"),
        "has a blood pressure of {systolic}/{diastolic} mm Hg",
    ),
    "anion_gap": Calculator(
        "compute_anion_gap_explanation", "anion gap", "mEq/L",
        _labs(sodium="sodium mEq/L", chloride="chloride mEq/L", bicarbonate="bicarbonate mEq/L"),
        "has sodium {sodium}, chloride {chloride} and bicarbonate {bicarbonate} mEq/L",
    ),
    "ldl_calculated": Calculator(
        "compute_ldl_explanation", "LDL cholesterol", "mg/dL",
        _labs(hdl_cholestrol="hdl mg/dL", triglycerides="triglycerides mg/dL", total_cholestrol="cholesterol mg/dL"),
        "has total cholesterol {cholesterol}, HDL {hdl} and triglycerides {triglycerides} mg/dL",
    ),
    "calcium_correction": Calculator(
        "calculate_corrected_calcium_explanation", "corrected calcium", "mg/dL",
        _labs(calcium="calcium mg/dL", albumin="albumin g/dL"),
        "has calcium {calcium} mg/dL and albumin {albumin} g/dL",
    ),
    "homa_ir": Calculator(
        "compute_homa_ir_explanation", "HOMA-IR score", "",
        _labs(insulin="insulin µIU/mL", glucose="glucose mg/dL"),
        "has fasting insulin {insulin} µIU/mL and glucose {glucose} mg/dL",
    ),
    "qt_calculator_hodges": Calculator(
        "hodges_calculator_explanation", "corrected QT interval by Hodges", "msec",
        _labs(heart_rate="pulse beats per minute", qt_interval="qt msec"),
        "has a heart rate of {pulse} and a QT interval of {qt} msec",
    ),
    "qt_calculator_bazett": Calculator(
        "bazett_calculator_explanation", "corrected QT interval by Bazett", "msec",
        _labs(heart_rate="pulse beats per minute", qt_interval="qt msec"),
        "has a heart rate of {pulse} and a QT interval of {qt} msec",
    ),
}  # fmt: skip
HELD_OUT = {
    "qt_calculator_rautaharju": Calculator(
        "rautaharju_calculator_explanation", "corrected QT interval by Rautaharju", "msec",
        _labs(heart_rate="pulse beats per minute", qt_interval="qt msec"),
        "has a heart rate of {pulse} and a QT interval of {qt} msec",
    ),
    "fibrosis_4": Calculator(
        "compute_fib4_explanation", "Fibrosis-4 score", "",
        lambda p: {
            "age": (p["age"], "years"), "ast": (p["ast"], "U/L"), "alt": (p["alt"], "U/L"),
            "platelet_count": (p["platelets"] * 1000, "µL"),
        },
        "has AST {ast} U/L, ALT {alt} U/L and {platelets} thousand platelets per µL",
    ),
    "ideal_body_weight": Calculator(
        "ibw_explanation", "ideal body weight", "kg",
        lambda p: {"sex": "Male" if p["sex"] == "man" else "Female", "height": (p["height"], "cm")},
        "is {height} cm tall",
    ),
}  # fmt: skip
QUESTIONS = (
    "{article} {age}-year-old {sex} {facts}. What is the {quantity}{unit}?",
    "Compute the {quantity}{unit} of a {sex} aged {age} who {facts}.",
    "My patient, a {sex} of {age}, {facts}. Please give the {quantity}{unit}.",
)


def patient(g: random.Random) -> dict[str, Any]:
    """Values as a clinic sees them; weight follows height, and blood pressure age."""
    sex = g.choice(("man", "woman"))
    age = g.randint(22, 88)
    height = round(g.gauss(177 if sex == "man" else 164, 7))
    systolic = round(min(190, max(92, g.gauss(105 + 0.4 * age, 14))))
    pulse = g.randint(54, 112)
    return {
        "sex": sex, "age": age, "height": height,
        "weight": round(min(45, max(17.5, g.gauss(26.5, 4.5))) * (height / 100) ** 2),
        "systolic": systolic, "diastolic": round(systolic * g.uniform(0.56, 0.68)),
        "sodium": round(min(152, max(124, g.gauss(139, 4)))), "chloride": round(min(114, max(90, g.gauss(103, 4)))),
        "bicarbonate": round(min(32, max(12, g.gauss(24, 3.5)))), "hdl": g.randint(32, 82),
        "triglycerides": g.randint(60, 280), "cholesterol": g.randint(165, 285),
        "calcium": round(min(11.5, max(6.9, g.gauss(8.8, 0.7))), 1),
        "albumin": round(min(4.8, max(1.9, g.gauss(3.4, 0.6))), 1), "insulin": g.randint(3, 32),
        "glucose": g.randint(72, 190), "pulse": pulse, "qt": round(400 * (60 / pulse) ** 0.33 * g.uniform(0.93, 1.1)),
        "ast": g.randint(14, 120), "alt": g.randint(10, 120), "platelets": g.randint(90, 380),
    }  # fmt: skip


def worked(name: str, calculator: Calculator, who: dict) -> tuple[str, str]:
    """The calculator's sentences in which something is computed, and the answer.

    What only repeats the question or states the formula in general is left out: rows are short."""
    function = getattr(importlib.import_module(f"medcalc.{name}"), calculator.function)
    found = function(calculator.inputs(who))
    sentences = re.split(r"(?<=\.)\s+|\n+", re.sub(r"[ \t]+", " ", found["Explanation"]))
    computed = [s.strip() for s in sentences if re.search(r"\d[^=]*= ?\d", s)]
    return " ".join(computed[-2:]), str(found["Answer"])


def example(g: random.Random, name: str, calculator: Calculator, who: dict) -> dict[str, str]:
    """question, reasoning, answer, number."""
    reasoning, number = worked(name, calculator, who)
    unit = f" in {calculator.unit}" if calculator.unit else ""
    article = "An" if 80 <= who["age"] < 90 else "A"
    question = g.choice(QUESTIONS).format(
        article=article,
        age=who["age"],
        sex=who["sex"],
        facts=calculator.facts.format(**who),
        quantity=calculator.quantity,
        unit=unit,
    )
    return {
        "question": question, "reasoning": reasoning, "answer": f"Answer: {number} {calculator.unit}".strip(),
        "number": number, "calculator": name,
    }  # fmt: skip


def examples(seed: str, count: int, calculators: dict[str, Calculator], taken: set[tuple]) -> list[dict[str, str]]:
    """`count` questions over calculators in turn, each of a patient of its own that is not in `taken` (added to it)."""
    _package("medcalc")  # says what to install
    g = random.Random(seed)
    found = []
    while len(found) < count:
        who = patient(g)
        key = tuple(sorted(who.items()))
        if key in taken:
            continue
        taken.add(key)
        name = list(calculators)[len(found) % len(calculators)]
        found.append({**example(g, name, calculators[name], who), "patient": repr(key)})
    return found
