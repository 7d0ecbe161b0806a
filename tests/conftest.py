import pytest
import torch

# Small tensors: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so reading it before writing cannot go unnoticed; and every op must be deterministic."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
