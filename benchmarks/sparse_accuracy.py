"""How far sparse gradients are from float64: on real text, by the number of entries, and where one profile is bad."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import texts
import torch
import torch.nn.functional as F
from sparse_states import load_states, save
from torch import Tensor
from tqdm import tqdm

import fused_losses as fl
from fused_losses.sparse import certificate, softmax, spectrum

DIRECTIONS = (0, 8, 16, 32)


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


class Truth:
    """Gradients in float64, chunk by chunk, for hidden states and head as given."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, a: Tensor, b: Tensor | None, reference=None
    ) -> None:
        self.hidden, self.weight = hidden.double(), weight.double()
        self.labels, self.a, self.b, self.reference = labels, a.double(), None if b is None else b.double(), reference

    def directions(self):
        for start in range(0, len(self.labels), 256):
            at = slice(start, start + 256)
            p = (self.hidden[at] @ self.weight.T).softmax(1)
            dz = self.a[at, None] * p
            dz.scatter_add_(1, self.labels[at, None], -self.a[at, None])
            if self.b is not None:
                dz += self.b[at, None] * (p - (self.reference[at].double() @ self.weight.T).softmax(1))
            yield at, p, dz

    def gradients(
        self, change: Callable[[slice, Tensor, Tensor], Tensor] = lambda at, p, dz: dz
    ) -> tuple[Tensor, Tensor]:
        dx, dw = torch.zeros_like(self.hidden), torch.zeros_like(self.weight)
        for at, p, dz in self.directions():
            dz = change(at, p, dz)
            dx[at] = dz @ self.weight
            dw.addmm_(dz.T, self.hidden[at])
        return dx, dw


def fused(hidden, weight, labels, a, b, reference, frozen=False, shared=False, **options):
    """Both gradients of Σ a·nll + b·kl by this package (of a frozen head one), and the report. `shared`: the reference
    is on the head that is trained, as 8-bit products need it."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    out = fl.token_losses(
        x,
        w,
        labels,
        reference=None if reference is None else fl.Reference(reference, None if shared else weight),
        **options,
    )
    (out.nll * a).sum().backward() if b is None else (out.nll * a + out.kl * b).sum().backward()
    return (x.grad, w.grad), out.gradient_report


def plain_bf16(hidden, weight, labels, a, b, reference):
    """What a training loop does in bf16: bf16 logits, float32 softmax."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    z = (x @ w.T).float()
    if b is None:
        (F.cross_entropy(z, labels, reduction="none") * a).sum().backward()
    else:
        log_r = (reference @ weight.T).float().log_softmax(1)
        ((log_r.exp() * (log_r - z.log_softmax(1))).sum(1) * b).sum().backward()
    return x.grad, w.grad


def weights_of(loss: str, nll: Tensor) -> tuple[Tensor, Tensor | None]:
    if loss == "cross-entropy":
        return torch.ones_like(nll), None
    if loss == "TALR":  # sequences of 256 tokens
        tau = torch.stack([part.mean() for part in nll.split(256)]).quantile(0.5)
        return (-nll / tau).exp().clamp(min=0.01), None
    return torch.zeros_like(nll), torch.ones_like(nll)


def keep_rule(threshold: float, labels: Tensor):
    def keep(p: Tensor, at: slice, other: Tensor | None = None) -> Tensor:
        wrong = 1 - p.gather(1, labels[at, None])
        kept = p > threshold * wrong.clamp(min=0).sqrt()
        if other is not None:
            kept |= other > threshold * wrong.clamp(min=0).sqrt()
        return kept.scatter(1, labels[at, None], True)

    return keep


def accuracy() -> None:
    states = load_states()
    weight = states["weight"]
    cases = []
    for kind, (hidden, labels) in states["texts"].items():
        for loss in ("cross-entropy", "TALR"):
            cases.append((kind, loss, hidden, labels, None))
    mixed = [torch.cat([pair[i][:512] for pair in states["texts"].values()]) for i in range(2)]
    for loss in ("cross-entropy", "TALR"):
        cases.append(("all four in one call", loss, *mixed, None))
    for kind in texts.TUNED:
        noisy = texts.with_label_noise(texts.Text(*states["texts"][kind]), len(weight))
        for loss in ("cross-entropy", "TALR"):
            cases.append((f"{kind}, 20 % random labels", loss, noisy.hidden, noisy.labels, None))
    for kind, (hidden, reference, labels) in states["adapted"].items():
        cases.append((kind, "KL", hidden, labels, reference))

    rows = []
    for kind, loss, hidden, labels, reference in tqdm(cases, desc="accuracy"):
        with torch.no_grad():
            before = fl.token_losses(
                hidden, weight, labels, reference=None if reference is None else fl.Reference(reference)
            )
        a, b = weights_of(loss, before.nll)
        truth = Truth(hidden, weight, labels, a, b, reference)
        dx, dw = truth.gradients()
        row = {"text": kind, "loss": loss, "N": len(labels), "nll": before.nll.mean().item()}
        row["kl"] = None if before.kl is None else before.kl.mean().item()
        ours, report = fused(hidden, weight, labels, a, b, reference, gradient="sparse")
        row |= {
            "entries": report.entries / report.tokens, "saved_MB_per_8192": saved_megabytes(report, len(weight)),
            "bound": report.bound, "certified": [report.hidden_bound, report.weight_bound],
            "exact_tokens": report.exact_tokens,
            "ours": [relative(g, t) for g, t in zip(ours, (dx, dw), strict=True)],
        }  # fmt: skip
        frozen, report = fused(hidden, weight, labels, a, b, reference, frozen=True, gradient="sparse")
        row["frozen"] = {
            "entries": report.entries / report.tokens, "certified": report.hidden_bound, "dx": relative(frozen[0], dx),
        }  # fmt: skip
        eighth, report = fused(hidden, weight, labels, a, b, reference, shared=True, gradient="sparse", scan="int8")
        row["int8"] = {
            "entries": report.entries / report.tokens, "certified": [report.hidden_bound, report.weight_bound],
            "errors": [relative(g, t) for g, t in zip(eighth, (dx, dw), strict=True)],
            "value_error": report.value_error, "note": report.scan_note,
        }  # fmt: skip
        if reference is None and loss == "cross-entropy":
            row["values"] = value_errors(hidden, weight, labels)
        keep = keep_rule(certificate.THRESHOLD, labels)

        def drop(at, p, dz, keep=keep, reference=reference):
            other = None if reference is None else (reference[at].double() @ weight.double().T).softmax(1)
            return dz * keep(p, at, other)

        row["tail dropped"] = [relative(g, t) for g, t in zip(truth.gradients(drop), (dx, dw), strict=True)]
        # The same inputs rounded to bf16, and the truth for these.
        x16, w16 = hidden.bfloat16(), weight.bfloat16()
        r16 = None if reference is None else reference.bfloat16()
        dx, dw = Truth(x16, w16, labels, a, b, r16).gradients()
        ours, _ = fused(x16, w16, labels, a, b, r16, gradient="sparse")
        row["ours, bf16"] = [relative(g, t) for g, t in zip(ours, (dx, dw), strict=True)]
        plain = plain_bf16(x16, w16, labels, a, b, r16)
        row["plain bf16"] = [relative(g, t) for g, t in zip(plain, (dx, dw), strict=True)]
        rows.append(row)
        tqdm.write(accuracy_line(row))
        tqdm.write(int8_line(row))
    content = {"threshold": certificate.THRESHOLD, "rows": rows, "curve": curve(states), "groups": groups()}
    save("sparse-accuracy", content)


# Edges of the histogram of a token's error, in nats.
EDGES = torch.logspace(-6, 0, 37)


@torch.no_grad()
def value_errors(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, dict]:
    """|error of the nll| of each token, against float64: of 8-bit products, and of bf16 logits, as plain PyTorch."""
    parts = [slice(start, start + 256) for start in range(0, len(labels), 256)]
    double = weight.double()
    truth = torch.cat([F.cross_entropy(hidden[at].double() @ double.T, labels[at], reduction="none") for at in parts])
    x16, w16 = hidden.bfloat16(), weight.bfloat16()
    found = {
        "int8": fl.token_losses(hidden, weight, labels, scan="int8").nll,
        "bf16 logits": torch.cat(
            [F.cross_entropy((x16[at] @ w16.T).float(), labels[at], reduction="none") for at in parts]
        ),
    }
    result = {}
    for name, nll in found.items():
        error = (nll.double() - truth).abs()
        counts = torch.histogram(error.float().clamp(EDGES[0], EDGES[-1]), EDGES).hist
        bias = (nll.double() - truth).mean().item()
        result[name] = {
            "mean": error.mean().item(), "largest": error.max().item(), "bias": bias, "histogram": counts.tolist(),
        }  # fmt: skip
    return result


def int8_line(row: dict) -> str:
    """A row of the table of 8-bit products; of those texts whose values were looked at."""
    found, values = row["int8"], row.get("values")
    kl = "" if row["kl"] is None else f" {row['kl']:.4f}"
    errors, certified = (
        " / ".join(f"{100 * e:.{digits}f}" for e in found[name]) for name, digits in (("errors", 2), ("certified", 1))
    )
    cells = "– | –"
    if values is not None:
        cells = " | ".join(
            f"{values[name]['mean']:.4f} / {values[name]['largest']:.3f}" for name in ("int8", "bf16 logits")
        )
    ours = " / ".join(f"{100 * e:.2f}" for e in row["ours"])
    return (
        f"| {row['text']} | {row['loss']}{kl} | {found['entries']:.0f} | {errors} | {ours} | {certified} | {cells} | "
        f"{found['value_error']:.4f} |"
    )


def saved_megabytes(report: fl.GradientReport, vocabulary: int, tokens: int = 8192) -> float:
    """What so many tokens would save: all but the profile grows with them."""
    profile = 4 * vocabulary
    return ((report.saved_bytes - profile) / report.tokens * tokens + profile) / 1e6


def accuracy_line(row: dict) -> str:
    figures = " | ".join(
        " / ".join(f"{100 * e:.2f}" for e in row[name]) for name in ("ours", "ours, bf16", "tail dropped", "plain bf16")
    )
    kl = "" if row["kl"] is None else f" {row['kl']:.4f}"
    certified = " / ".join(f"{100 * bound:.1f}" for bound in row["certified"])
    frozen = row["frozen"]
    figures += f" | {frozen['entries']:.0f}: {100 * frozen['dx']:.2f} ≤ {100 * frozen['certified']:.1f}"
    return (
        f"| {row['text']} | {row['loss']}{kl} | {row['entries']:.0f} | {100 * row['bound']:.1f} | {certified} | "
        f"{figures} |"
    )


@contextlib.contextmanager
def directions(count: int) -> Iterator[None]:
    """So many directions of the head; 0: none, and no certificate of dx and dW."""
    found = (lambda *_: None) if count == 0 else softmax.directions_of
    with (
        mock.patch.object(softmax, "directions_of", found),
        mock.patch.object(spectrum, "spectrum", functools.partial(spectrum.spectrum, count=max(1, count))),
        mock.patch.object(spectrum, "_known", []),
    ):
        yield


def curve(states: dict) -> list[dict]:
    """Error of dx and dW against entries kept, by the number of directions, and without the tail; cross-entropy."""
    points = []
    weight = states["weight"]
    for kind in texts.TUNED:
        hidden, labels = (t[:1024] for t in states["texts"][kind])
        a = torch.ones(len(labels))
        truth = Truth(hidden, weight, labels, a, None)
        exact = truth.gradients()
        for exponent in tqdm(range(-2, 4), desc=f"curve, {kind}"):
            threshold = certificate.THRESHOLD * 2.0**-exponent
            keep = keep_rule(threshold, labels)
            dropped = truth.gradients(lambda at, p, dz, keep=keep: dz * keep(p, at))
            point = {"text": kind, "threshold": threshold, "by directions": {}}
            point["dropped"] = [relative(g, t) for g, t in zip(dropped, exact, strict=True)]
            for count in DIRECTIONS:
                with (
                    directions(count),
                    mock.patch.object(certificate, "THRESHOLD", threshold),
                ):
                    ours, report = fused(hidden, weight, labels, a, None, None, gradient="sparse", tolerance=0.9)
                point["entries"] = report.entries / len(labels)
                point["by directions"][count] = {
                    "errors": [relative(g, t) for g, t in zip(ours, exact, strict=True)],
                    "certified": [report.hidden_bound, report.weight_bound], "bound": report.bound,
                }  # fmt: skip
            points.append(point)
    return points


def groups() -> list[dict]:
    """Synthetic, and bad for one profile: two halves of the vocabulary that no token mixes.

    One direction of the head tells them apart. A token of either half has a tail in its half only, and the profile is
    the mean of both. `distance` is how far apart the halves' rows of the head are, in standard deviations of a row's
    norm. The logits are the same for every distance.
    """
    n, d, v = 512, 64, 32000
    rows = []
    for distance, both, tolerance, count in [
        *((distance, True, certificate.TOLERANCE, 0) for distance in (1.0, 10.0, 100.0)),
        *((distance, True, certificate.TOLERANCE, spectrum.COUNT) for distance in (1.0, 10.0, 100.0)),
        (100.0, False, certificate.TOLERANCE, spectrum.COUNT),
    ]:
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(v, d, generator=g) / d**0.5
        weight[:, 0] = -(1.0 + torch.arange(v) % (v // 2)).log()
        weight[:, 1] = torch.where(torch.arange(v) < v // 2, distance, -distance)
        hidden = 2.5 * torch.randn(n, d, generator=g)
        hidden[:, 0], hidden[:, 1] = 1.2, 10 / distance
        if both:
            hidden[n // 2 :, 1] *= -1
        labels = torch.multinomial((hidden @ weight.T).softmax(1), 1, generator=g)[:, 0]
        truth = Truth(hidden, weight, labels, torch.ones(n), None).gradients()
        with directions(count):
            ours, report = fused(
                hidden, weight, labels, torch.ones(n), None, None, gradient="sparse", tolerance=tolerance
            )
        rows.append({
            "distance": distance, "halves": 1 + both, "directions": count, "bound": report.bound,
            "certified": [report.hidden_bound, report.weight_bound],
            "exact_tokens": report.exact_tokens, "entries": report.entries / n,
            "ours": [relative(got, exact) for got, exact in zip(ours, truth, strict=True)],
        })  # fmt: skip
        tqdm.write(groups_line(rows[-1]))
    return rows


def groups_line(row: dict) -> str:
    errors = " / ".join(f"{100 * e:.2f}" for e in row["ours"])
    certified = " / ".join("–" if bound is None else f"{100 * bound:.1f}" for bound in row["certified"])
    return (
        f"| {row['distance']:g} | {row['halves']} | {row['directions']} | {100 * row['bound']:.1f} | {certified} | "
        f"{row['exact_tokens']} of 512 | {errors} |"
    )
