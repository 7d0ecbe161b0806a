"""What the pages say of a GPU stands in the committed results, and what is read of a trace is in it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def test_the_page_is_that_of_the_results(module):
    pages = module("gpu_pages")
    page = (ROOT / pages.PAGE).read_text()
    assert pages.filled(page, pages.page(), pages.PAGE, pages.BEGIN, pages.END) == page
    assert "| LAwF, frozen head | fused_losses, sparse | " in page


def test_without_results_it_says_so(module, tmp_path):
    assert module("gpu_pages").page(tmp_path) == "No run on a GPU is kept."


def event(cat, name, ts, dur):
    return {"cat": cat, "name": name, "ts": ts, "dur": dur}


def test_of_a_trace(module):
    """Times overlap where there are two streams; what runs on the host is no kernel."""
    trace = module("gpu_trace")
    events = [
        event("kernel", "scan", 1000, 3000), event("kernel", "scan", 3000, 2000),
        event("gpu_memcpy", "copy", 7000, 500),
        event("cpu_op", "aten::mm", 0, 9000), event("cuda_runtime", "cudaStreamSynchronize", 100, 50),
        event("cuda_runtime", "cudaLaunchKernel", 200, 5), {"name": "a mark", "ts": 3},
    ]  # fmt: skip
    found = trace.summary(events)
    assert found["by_kernel"] == [
        {"name": "scan", "calls": 2, "ms": 5.0}, {"name": "copy", "calls": 1, "ms": 0.5},
    ]  # fmt: skip
    assert (found["span_ms"], found["busy_ms"], found["kernels"], found["waits"]) == (6.5, 4.5, 3, 1)
    assert trace.summary([])["kernels"] == 0


def test_names_of_kernels_are_short(module):
    short = module("gpu_trace").short
    name = "void fused_losses::cuda::(anonymous namespace)::attention_kernel<__nv_bfloat16, 1>(fused_losses::cuda::A)"
    assert short(name) == "attention_kernel" and short("scan") == "scan"
