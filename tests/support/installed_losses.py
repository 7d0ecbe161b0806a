"""Three losses of an installed package against PyTorch's; what was found, as JSON. Wheels are tested with it.

python tests/support/installed_losses.py BACKEND
"""

import json
import sys
from pathlib import Path

import fused_losses as fl  # first: torch by itself warns where numpy is missing

# isort: split
import torch

from fused_losses import backends
from fused_losses.kernels import build

backend = sys.argv[1]
hidden = torch.arange(40.0).sin().view(5, 8).requires_grad_()
weight = torch.arange(88.0).cos().view(11, 8)
for gradient, off in (("exact", 1e-5), ("sparse", 0.1)):
    loss = fl.CrossEntropyLoss(backend=backend, gradient=gradient)(hidden, weight, torch.arange(5))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(5))
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    assert (found - wanted).norm() <= off * wanted.norm(), gradient
print(
    json.dumps(
        {
            "package": str(Path(fl.__file__).parent),
            "reason": backends.unavailable("cpu"),
            "readme": str(build.csrc() / "README.md"),
            "numpy": "numpy" in sys.modules,
        }
    )
)
