import importlib
import itertools
import os
import random
from pathlib import Path

import grids
import pytest
import torch

# Small tensors: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor in processes that tests start
# No test needs the hub, and without a network to ask for a name takes most of a minute. Read when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files that say most in the least time.
FAST = frozenset(
    f"test_{name}.py"
    for name in (
        "token_losses", "outputs", "orders", "low_rank", "validation", "mistakes", "training_loop", "peak_memory",
        "l2_and_wise_ft",
        "sparse_softmax", "certificate", "gradient_report", "cpu_kernels", "objectives",
        "collator", "labels", "references", "cached_reference", "reference_cache", "model_digest", "stand_ins",
        "patch", "patch_logits", "patch_refused", "patched_layouts",
    )
)  # fmt: skip

# Those that take longest begin early: of the workers none has one for itself at the end. Longest first.
LONG = tuple(
    f"test_{name}.py"
    for name in (
        "spread", "types", "compile", "gpu_commands", "examples", "installation", "demo", "session_speed",
        "topk_real_model", "package", "resume", "bench", "peak_memory", "distributed", "endings", "train",
        "vocab_parallel", "nvcc", "annotate_command", "callback", "trl", "trainers", "cpu_exact_kernels",
        "patch_others", "compiled_models", "causal_models",
    )
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true", help="only the files that say most in the least time (make test-fast)"
    )
    parser.addoption(
        "--exhaustive", action="store_true", help="every case of every grid, and more random examples (make test-all)"
    )


def pytest_configure(config):
    grids.EXHAUSTIVE = config.getoption("--exhaustive")


def pytest_ignore_collect(collection_path, config):
    return (config.getoption("--fast") and collection_path.suffix == ".py" and collection_path.name not in FAST) or None


def pytest_collection_modifyitems(config, items):
    """Fast files first, then the longest; without --exhaustive the cases of `covering`, none marked `exhaustive`."""
    order = dict.fromkeys(FAST, 0) | {name: place for place, name in enumerate(LONG, 1)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if grids.EXHAUSTIVE:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    for marker, together in (("pairwise", 2), ("each_value", 1)):
        marked = [i for i in items if i.get_closest_marker(marker) and not i.get_closest_marker("exhaustive")]
        for name, cases in itertools.groupby(marked, key=lambda item: item.nodeid.partition("[")[0]):
            cases = list(cases)
            values = [[(key, id(v)) for key, v in item.callspec.params.items()] for item in cases]
            # The seed is the test's own name: a test that moves to another file keeps its cases.
            chosen = grids.covering(values, together, random.Random(name.rpartition("::")[2]))
            left_out += [item for at, item in enumerate(cases) if at not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so reading it before writing cannot go unnoticed; and every op must be deterministic."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shim(request, tmp_path_factory):
    """csrc/cuda for a CPU; kept from run to run, as it takes 10 seconds to compile."""
    from cuda_shim import shim as shim_module

    cache = getattr(request.config, "cache", None)
    return shim_module.load(tmp_path_factory.mktemp("shim") if cache is None else cache.mkdir("cuda_shim"))


@pytest.fixture(scope="session")
def smollm_folder(request, tmp_path_factory):
    """SmolLM2-135M-Instruct as safetensors, which load in a second where the GGUF file takes fifteen; kept from run to
    run, written by one of the workers of pytest-xdist."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from filelock import FileLock

    from fused_losses.demo.model import find_model, load
    from fused_losses.training.model import without_gguf_mark

    try:
        source = find_model(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cache = getattr(request.config, "cache", None)
    root = tmp_path_factory.mktemp("smollm") if cache is None else cache.mkdir("smollm")
    folder = root / f"{source.stem}-{source.stat().st_size}"
    with FileLock(root / "lock"):
        if not folder.exists():
            new = root / "new"
            tokenizer, model = load(source)
            tokenizer.save_pretrained(new)
            without_gguf_mark(model).save_pretrained(new)
            new.rename(folder)
    return folder


@pytest.fixture(scope="module")
def smollm(smollm_folder):
    """Its tokenizer and the model, as `fused_losses.demo.model.load` gives them; a module's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.use_deterministic_algorithms(False)
    model = AutoModelForCausalLM.from_pretrained(smollm_folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(smollm_folder), model.eval().requires_grad_(False)


# Tables for the end of the run, also from the processes of pytest-xdist.
TABLES: list[str] = []


@pytest.fixture
def show_table():
    return TABLES.append


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = TABLES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TABLES.extend(getattr(node, "workeroutput", {}).get("tables", ()))


def pytest_terminal_summary(terminalreporter):
    for table in TABLES:
        terminalreporter.write_line("")
        terminalreporter.write(table + "\n")


@pytest.fixture(scope="module")
def from_benchmarks():
    """Imports a file of benchmarks/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module
