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
