"""Sparse-plus-rank-one gradients, measured: how wrong, how fast, and the figures of docs/method.md.

    python benchmarks/sparse.py [accuracy] [speed] [figures] [tables]       (default: all; about 45 minutes on 2 cores)

Hidden states are those of SmolLM2-135M-Instruct on real text (benchmarks/texts.py), kept in a cache beside the results that is
made anew when texts.py changes. D = 2048 is the same states and head in a rotated, wider basis: equal logits, wider products.
Truth is float64. Each step writes benchmarks/results/sparse-*.json; training curves are those of benchmarks/training.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import texts
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fused_losses as fl
from fused_losses import backends
from fused_losses.sparse import certificate

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs"
KL_TARGET = 0.003
STEPS = ("accuracy", "speed", "figures", "tables")


def save(name: str, content: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    content["device"] = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fused_losses": fl.__version__,
        "backend": backends.choose("auto", "cpu"),
    }
    temporary = RESULTS / f"{name}.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, RESULTS / f"{name}.json")


# --- hidden states -----------------------------------------------------------------------------------------------------


def load_states() -> dict:
    """{"weight", "texts": {kind: (hidden, labels)}, "adapted": {kind: (hidden, hidden of the original, labels)}}."""
    digest = hashlib.sha256(Path(texts.__file__).read_bytes()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"fused-losses-states-{digest}.pt"
    if path.is_file():
        return torch.load(path)
    model, tokenizer = texts.model_and_tokenizer()
    weight = model.lm_head.weight.detach().clone()
    rows = {kind: texts.rows_of(kind, model, tokenizer) for kind in ("generated", "documentation", "code", "clinical")}
    result: dict = {"weight": weight, "texts": {}, "adapted": {}}
    for kind, parts in tqdm(rows.items(), desc="hidden states"):
        text = texts.states(model, *parts)
        result["texts"][kind] = (text.hidden, text.labels)
    adapted = trained_adapter(model, rows["code"][0][0])
    for kind in tqdm(texts.TUNED, desc="hidden states of the adapted model"):
        original, labels = result["texts"][kind]
        low, high = 0.0, 1.0
        for _ in range(7):  # the adapter's strength that gives the KL of LAwF's working range
            strength = (low + high) / 2
            scale_adapter(adapted, strength)
            some = [r[:513] for r in rows[kind][0]], rows[kind][1]
            x = texts.states(adapted, *some)
            reference = torch.cat([original[: len(x.labels)]]) if kind != "generated" else original
            out = fl.token_losses(x.hidden, weight, x.labels, reference=fl.Reference(reference))
            low, high = (strength, high) if out.kl.mean() < KL_TARGET else (low, strength)
        x = texts.states(adapted, *rows[kind])
        result["adapted"][kind] = (x.hidden, original, labels)
    torch.save(result, path)
    return result


def trained_adapter(model, ids: Tensor):
    """A LoRA trained for a few steps on code, so that its changes are those that training makes."""
    from fused_losses.demo import teach
    from fused_losses.demo.model import hidden_states

    adapted = teach.add_lora(model)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    head = model.lm_head.weight.detach()
    for _ in tqdm(range(12), desc="adapter"):
        hidden = hidden_states(adapted, ids[None, :256])
        fl.CrossEntropyLoss()(hidden, head, ids[None, 1:257]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.requires_grad_(False)


def scale_adapter(adapted, strength: float) -> None:
    for module in adapted.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: 2.0 * strength for name in module.scaling}


# --- accuracy ----------------------------------------------------------------------------------------------------------


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


def fused(hidden, weight, labels, a, b, reference, **options):
    """Both gradients of Σ a·nll + b·kl by this package, and the report."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fl.token_losses(
        x, w, labels, reference=None if reference is None else fl.Reference(reference, weight), **options
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
            "bound": report.bound, "exact_tokens": report.exact_tokens,
            "ours": [relative(g, t) for g, t in zip(ours, (dx, dw), strict=True)],
        }  # fmt: skip
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
    content = {"threshold": certificate.THRESHOLD, "rows": rows, "curve": curve(states), "groups": groups()}
    save("sparse-accuracy", content)


def saved_megabytes(report: fl.GradientReport, vocabulary: int, tokens: int = 8192) -> float:
    """What so many tokens would save: all but the profile grows with them."""
    profile = 4 * vocabulary
    return ((report.saved_bytes - profile) / report.tokens * tokens + profile) / 1e6


def accuracy_line(row: dict) -> str:
    figures = " | ".join(
        " / ".join(f"{100 * e:.2f}" for e in row[name]) for name in ("ours", "ours, bf16", "tail dropped", "plain bf16")
    )
    kl = "" if row["kl"] is None else f" {row['kl']:.4f}"
    return f"| {row['text']} | {row['loss']}{kl} | {row['entries']:.0f} | {100 * row['bound']:.1f} | {figures} |"


def curve(states: dict) -> list[dict]:
    """Error of dx and dW against entries kept, with the rank-one tail and without, cross-entropy."""
    points = []
    weight = states["weight"]
    for kind in texts.TUNED:
        hidden, labels = (t[:1024] for t in states["texts"][kind])
        a = torch.ones(len(labels))
        truth = Truth(hidden, weight, labels, a, None)
        dx, dw = truth.gradients()
        for exponent in tqdm(range(-2, 5), desc=f"curve, {kind}"):
            threshold = certificate.THRESHOLD * 2.0**-exponent
            keep = keep_rule(threshold, labels)
            entries = 0

            def drop(at, p, dz, keep=keep):
                nonlocal entries
                kept = keep(p, at)
                entries += int(kept.sum())
                return dz * kept

            dropped = truth.gradients(drop)
            plain, certificate.THRESHOLD = certificate.THRESHOLD, threshold
            try:
                ours, report = fused(hidden, weight, labels, a, None, None, gradient="sparse", tolerance=0.9)
            finally:
                certificate.THRESHOLD = plain
            points.append({
                "text": kind, "threshold": threshold, "entries": entries / len(labels), "bound": report.bound,
                "dropped": [relative(g, t) for g, t in zip(dropped, (dx, dw), strict=True)],
                "ours": [relative(g, t) for g, t in zip(ours, (dx, dw), strict=True)],
            })  # fmt: skip
    return points


def groups() -> list[dict]:
    """Made up to be bad for one profile: two halves of the vocabulary that no token mixes, told apart by one direction of the head.

    A token of either half has a tail in its half only, the profile is the mean of both, and `distance` is how far apart the halves'
    rows of the head are, in standard deviations of a row's norm. The logits are the same for every distance.
    """
    n, d, v = 512, 64, 32000
    rows = []
    for distance, both, tolerance in [
        *((distance, both, certificate.TOLERANCE) for distance in (1.0, 10.0, 100.0) for both in (False, True)),
        *((10.0, True, tolerance) for tolerance in (0.1, 0.05, 0.03, 0.02)),
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
        ours, report = fused(hidden, weight, labels, torch.ones(n), None, None, gradient="sparse", tolerance=tolerance)
        rows.append({
            "distance": distance, "halves": 1 + both, "tolerance": tolerance, "bound": report.bound,
            "exact_tokens": report.exact_tokens, "entries": report.entries / n,
            "ours": [relative(got, exact) for got, exact in zip(ours, truth, strict=True)],
        })  # fmt: skip
        tqdm.write(groups_line(rows[-1]))
    return rows


def groups_line(row: dict) -> str:
    errors = " / ".join(f"{100 * e:.2f}" for e in row["ours"])
    return (
        f"| {row['distance']:g} | {row['halves']} | {100 * row['tolerance']:g} | {100 * row['bound']:.1f} | "
        f"{row['exact_tokens']} of 512 | {errors} |"
    )


# --- speed -------------------------------------------------------------------------------------------------------------


def inputs(states: dict, d: int, dtype: torch.dtype, flat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2,048 tokens, half of either text; hidden, weight, labels, reference hidden."""
    parts = [states["adapted"][kind] for kind in texts.TUNED]
    hidden, reference, labels = (torch.cat([p[i] for p in parts])[-2048:] for i in range(3))
    weight = states["weight"]
    if d != hidden.shape[1]:
        basis = torch.linalg.qr(torch.randn(d, hidden.shape[1], generator=torch.Generator().manual_seed(0)))[0]
        hidden, weight, reference = hidden @ basis.T, weight @ basis.T, reference @ basis.T
    if flat:
        hidden = hidden * 0.01
    return hidden.to(dtype), weight.to(dtype), labels, reference.to(dtype)


def contestants(labels: Tensor, reference: Tensor) -> dict[str, dict[str, tuple[Callable, bool]]]:
    """{group: {name: (loss of hidden and weight, head frozen)}}"""
    rows = labels.view(8, -1)
    anchors = (torch.arange(len(labels)) % 20 == 0).float()
    options = torch.nn.LinearCrossEntropyOptions()

    def eager_talr(x, w):
        nll = F.cross_entropy((x @ w.T).float(), labels, reduction="none")
        tau = nll.detach().view(rows.shape).mean(1).quantile(0.5)
        return ((-nll.detach() / tau).exp().clamp(min=0.01) * nll).mean()

    def eager_lawf(x, w):
        with torch.no_grad():
            log_r = (reference @ w.T).float().log_softmax(1)
        log_p = (x @ w.T).float().log_softmax(1)
        kl = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
        return (anchors * -log_p.gather(1, labels[:, None])[:, 0] + (1 - anchors) * kl).mean()

    def ours(loss, **kwargs):
        result = {}
        for gradient in ("sparse", "exact"):
            module = loss(gradient=gradient)
            shaped = (lambda x: x.view(8, -1, x.shape[1])) if loss is fl.TALRLoss else (lambda x: x)
            y = rows if loss is fl.TALRLoss else labels
            result[f"fused_losses, {gradient}"] = lambda x, w, module=module, shaped=shaped, y=y: module(
                shaped(x), w, y, **kwargs
            )
        return result

    groups = {
        "cross-entropy": {
            "eager, full logits": lambda x, w: F.cross_entropy((x @ w.T).float(), labels),
            "F.linear_cross_entropy, chunked": lambda x, w: F.linear_cross_entropy(x, w, labels, options=options),
            **ours(fl.CrossEntropyLoss),
        },
        "TALR": {"eager, full logits": eager_talr, **ours(fl.TALRLoss)},
        "LAwF, frozen shared head": {
            "eager, full logits": eager_lawf,
            **ours(fl.LAwFLoss, confidence=anchors, reference=fl.Reference(reference)),
        },
    }
    result = {
        group: {name: (loss, group.startswith("LAwF")) for name, loss in members.items()}
        for group, members in groups.items()
    }
    frozen = {n: (f, True) for n, f in groups["cross-entropy"].items() if not n.startswith("F.")}
    return result | {"cross-entropy, frozen head": frozen}


FIRST = ("cross-entropy",)  # groups measured before the others, with all rounds


def speed(runs: int) -> None:
    states = load_states()
    rows: list[dict] = []
    split: list[dict] = []
    print("| distribution | loss | D | dtype | | s | in forward GEMMs | time / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for first in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for d in (576, 2048):
                for flat in (False, True) if first else (False,):
                    hidden, weight, labels, reference = inputs(states, d, dtype, flat)
                    where = {
                        "distribution": "flat" if flat else "real text",
                        "D": d,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    for group, members in contestants(labels, reference).items():
                        if (group in FIRST) != first:
                            continue
                        if flat:
                            members = {n: m for n, m in members.items() if n.startswith("fused_losses")}
                        for name, figures in measure(
                            hidden, weight, members, runs if first else max(1, runs // 2 + 1)
                        ).items():
                            rows.append(where | {"loss": group, "name": name} | figures)
                            print(speed_line(rows[-1]), flush=True)
                    if first and not flat:
                        split.append(where | time_split(hidden, weight, labels))
                    save("sparse-speed-cpu", {"N": 2048, "V": len(weight), "rows": rows, "split": split})


def speed_line(row: dict) -> str:
    return (
        f"| {row['distribution']} | {row['loss']} | {row['D']} | {row['dtype']} | {row['name']} | {row['seconds']:.2f} | "
        f"{row['gemms']:.2f} | {row['speed_of_ours']:.2f} |"
    )


def measure(hidden: Tensor, weight: Tensor, members: dict, runs: int) -> dict[str, dict]:
    """Each round runs the forward product alone, then every contestant once; the round before is for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in members}
    gemm = []
    for round_number in range(runs + 1):
        start = time.perf_counter()
        hidden @ weight.T
        taken = {"": time.perf_counter() - start}
        for name, (loss, frozen) in members.items():
            if round_number == 0 and runs > 1 and not name.startswith("fused_losses"):
                continue
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
            start = time.perf_counter()
            value = loss(x, w)
            value.backward()
            taken[name] = time.perf_counter() - start
            del x, w, value
        if round_number:  # the first warms up
            gemm.append(taken.pop(""))
            for name, t in taken.items():
                seconds[name].append(t)
    ours = seconds["fused_losses, sparse"]
    return {
        name: {
            "seconds": statistics.median(times),
            "gemms": statistics.median(t / g for t, g in zip(times, gemm, strict=True)),
            "speed_of_ours": statistics.median(t / o for t, o in zip(times, ours, strict=True)),
            "rounds": times,
        }
        for name, times in seconds.items()
    }


PARTS = {
    "logits": "logits (GEMM)", "compact": "row statistics, compaction", "pack": "row statistics, compaction",
    "tail_profile": "tail profile", "weighted_sum": "tail profile", "rows_product": "dx = S'W + m'(qᵀW)",
    "columns_product": "dW = S'ᵀx + q(m'ᵀx)",
}  # fmt: skip


def time_split(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict:
    """Where one call of cross-entropy spends its time, with compiled kernels."""
    from torch.profiler import profile

    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fl.CrossEntropyLoss(gradient="sparse")
    loss(x, w, labels).backward()
    x.grad = w.grad = None
    start = time.perf_counter()
    hidden @ weight.T
    gemm = time.perf_counter() - start
    with profile() as record:
        start = time.perf_counter()
        loss(x, w, labels).backward()
        total = time.perf_counter() - start
    parts = dict.fromkeys(PARTS.values(), 0.0)
    for event in record.key_averages():
        name = event.key.removeprefix("fused_losses::")
        if event.key.startswith("fused_losses::") and name in PARTS:
            parts[PARTS[name]] += event.self_cpu_time_total / 1e6
    parts["everything else"] = total - sum(parts.values())
    return {"seconds": total, "gemm_seconds": gemm, "parts": parts}


# --- figures -----------------------------------------------------------------------------------------------------------


def figures() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = json.loads((RESULTS / "sparse-accuracy.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
    for axis, what, gradient in zip(axes, (0, 1), ("dx", "dW"), strict=True):
        for kind, color in zip(texts.TUNED, ("tab:blue", "tab:orange"), strict=True):
            points = [p for p in record["curve"] if p["text"] == kind]
            entries = [p["entries"] for p in points]
            axis.plot(entries, [100 * p["ours"][what] for p in points], "o-", color=color, label=f"{kind}: S + m qᵀ")
            axis.plot(entries, [100 * p["dropped"][what] for p in points], "o--", color=color, alpha=0.5,
                      label=f"{kind}: tail dropped")  # fmt: skip
            default = next(p for p in points if p["threshold"] == record["threshold"])
            axis.plot(default["entries"], 100 * default["ours"][what], "o", color=color, markersize=11)
            plain = next(r for r in record["rows"] if r["text"] == kind and r["loss"] == "cross-entropy")["plain bf16"]
            axis.axhline(
                100 * plain[what], color=color, linewidth=1, linestyle=":", label=f"{kind}: plain bf16, all entries"
            )
        axis.set(xscale="log", yscale="log", xlabel="entries kept per token", title=gradient)
        axis.set_xticks([25, 50, 100, 200, 400, 800], ["25", "50", "100", "200", "400", "800"])
        axis.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3, 10], ["0.01", "0.03", "0.1", "0.3", "1", "3", "10"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative L2 error, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="upper center")
    _write(figure, "sparse-error.png", top=0.86)

    split = json.loads((RESULTS / "sparse-speed-cpu.json").read_text())
    figure, axis = plt.subplots(figsize=(9, 3.2))
    labels = [f"D = {s['D']}, {s['dtype']}" for s in split["split"]]
    left = [0.0] * len(labels)
    colors = ("tab:gray", "tab:green", "tab:olive", "tab:blue", "tab:orange", "tab:red")
    for (part, _), color in zip(split["split"][0]["parts"].items(), colors, strict=True):
        share = [s["parts"][part] / s["seconds"] * 100 for s in split["split"]]
        axis.barh(labels, share, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, share, strict=True)]
    alone = [s["gemm_seconds"] / s["seconds"] * 100 for s in split["split"]]
    axis.plot(alone, labels, "k|", markersize=24, markeredgewidth=2, label="torch.mm alone")
    axis.set(xlabel="% of forward + backward, cross-entropy, N = 2048, V = 49,152", xlim=(0, 5 + max([100, *alone])))
    axis.invert_yaxis()
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=3, loc="upper center", markerscale=0.4)
    _write(figure, "sparse-time.png", top=0.82)

    path = RESULTS / "training.json"
    if not path.is_file():
        return
    training = json.loads(path.read_text())
    names = sorted({key.rsplit(" ", 1)[0] for key in training["runs"]}, reverse=True)
    figure, axes = plt.subplots(2, len(names), figsize=(3 * len(names), 4.6), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        exact, sparse = (training["runs"][f"{name} {g}"]["losses"] for g in ("exact", "sparse"))
        axes[0][column].plot(exact, color="black", label="exact")
        axes[0][column].plot(sparse, "--", color="tab:red", label="sparse")
        axes[0][column].set(title=name)
        difference = [100 * abs(a - b) / abs(a) for a, b in zip(exact, sparse, strict=True)]
        axes[1][column].plot(difference, color="tab:red")
        axes[1][column].axhline(0.5, color="black", linewidth=1, linestyle=":")
        axes[1][column].set(xlabel="step", ylim=(0, 0.6))
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("difference of the losses, %")
    axes[1][0].text(0, 0.51, "0.5 %", fontsize=9)
    axes[0][0].legend()
    _write(figure, "sparse-training.png")


def tables() -> None:
    """The tables of docs/method.md and docs/benchmarks.md, from the committed results."""
    record = json.loads((RESULTS / "sparse-accuracy.json").read_text())
    print("| text | loss | entries | bound, % | ours | ours, bf16 | tail dropped | plain bf16 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in record["rows"]:
        print(accuracy_line(row))
    print(
        "\n| distance | halves in the call | tolerance, % | bound, % | exact tokens | dx / dW, % |\n|---|---|---|---|---|---|"
    )
    for row in record["groups"]:
        print(groups_line(row))
    kinds = {kind: [r for r in record["rows"] if r["text"] == kind] for kind in texts.TUNED}
    for kind, rows in kinds.items():
        saved = ", ".join(f"{r['loss']} {r['saved_MB_per_8192']:.1f} MB" for r in rows)
        print(f"saved for backward, N = 8192, {kind}: {saved}")
    split = json.loads((RESULTS / "sparse-speed-cpu.json").read_text())
    print("\n| D | dtype | s | torch.mm, s |", " | ".join(split["split"][0]["parts"]), "|")
    print("|---|---|---|---|" + "---|" * len(split["split"][0]["parts"]))
    for row in split["split"]:
        parts = " | ".join(f"{100 * seconds / row['seconds']:.0f} %" for seconds in row["parts"].values())
        print(f"| {row['D']} | {row['dtype']} | {row['seconds']:.2f} | {row['gemm_seconds']:.2f} | {parts} |")
    for dtype in ("float32", "bfloat16"):
        print(
            f"\n{dtype}\n\n| distribution | loss | D | | s | in forward GEMMs | time / ours |\n|---|---|---|---|---|---|---|"
        )
        for row in split["rows"]:
            if row["dtype"] == dtype:
                print(speed_line(row).replace(f" {dtype} |", ""))
    training = json.loads((RESULTS / "training.json").read_text())["runs"]
    print("\n| | loss, first and last step | largest difference at any step | largest bound |\n|---|---|---|---|")
    for name in dict.fromkeys(key.rsplit(" ", 1)[0] for key in training):
        exact, sparse = (training[f"{name} {g}"]["losses"] for g in ("exact", "sparse"))
        worst = max(abs(a - b) / abs(a) for a, b in zip(exact, sparse, strict=True))
        bound = max(training[f"{name} sparse"]["bounds"])
        print(f"| {name} | {exact[0]:.3f}, {exact[-1]:.3f} | {100 * worst:.2f} % | {100 * bound:.1f} % |")


def _write(figure, name: str, top: float | None = None) -> None:
    figure.tight_layout(rect=(0, 0, 1, top or 1))
    temporary = PICTURES / f".{name}.tmp"
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, PICTURES / name)
    print(f"written to docs/{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", default=list(STEPS))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    for step in options.steps:
        if step == "speed":
            speed(options.runs)
        else:
            {"accuracy": accuracy, "figures": figures, "tables": tables}[step]()


if __name__ == "__main__":
    main()
