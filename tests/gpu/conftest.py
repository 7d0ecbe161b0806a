"""Checks of the kernels on a GPU: `make gpu-check`. Without one they are skipped.

FUSED_LOSSES_GPU_DRY=1 runs the same code on CPU tensors in Triton's interpreter, on tiny shapes, so that nothing runs
for the first time on the day there is a GPU.
"""

import json
import os
from pathlib import Path

import pytest

if os.environ.get("FUSED_LOSSES_GPU_DRY") == "1":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # tests/conftest.py asks for deterministic operations

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    import machine

    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if os.environ.get("FUSED_LOSSES_GPU_DRY") == "1":  # a GPU gets every case
                item.add_marker(pytest.mark.each_value)
            if machine.SKIP:
                item.add_marker(pytest.mark.skip(reason=machine.SKIP))


def pytest_runtest_logreport(report):
    """A line of JSON for each result where gpu_check.py wants them: a crash of this process loses none before it."""
    path = os.environ.get("FUSED_LOSSES_GPU_LOG")
    if path is None or not (report.when == "call" or report.outcome != "passed"):
        return
    reason = ""
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash else report.longrepr)[:600]
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
    with open(path, "a") as log:
        log.write(json.dumps(line | dict(report.user_properties)) + "\n")


@pytest.fixture
def within(record_property):
    """Notes the error nearest its bound; fails where one is above its own."""
    worst: dict = {}

    def check(**figures):
        for name, (error, bound) in figures.items():
            ratio = error / bound if bound else (0.0 if error == 0 else float("inf"))
            if not worst or not ratio <= worst["ratio"]:  # NaN is the worst
                worst.update(ratio=ratio, output=name, error=error, bound=bound)
                for key, value in worst.items():
                    record_property(key, value)
        above = {n: f"{e:.3g} > {b:.3g}" for n, (e, b) in figures.items() if not e <= b}
        assert not above, ", ".join(f"{name}: {text}" for name, text in above.items())

    return check
