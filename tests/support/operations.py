"""Which of PyTorch's operations a call makes."""

from torch.utils._python_dispatch import TorchDispatchMode

# Of the list in PyTorch's documentation of torch.use_deterministic_algorithms, what losses could call.
REFUSED = {"bincount", "histc", "kthvalue", "median", "put_", "put", "scatter_reduce", "scatter_reduce_"}
OF_FLOATS = {"cumsum", "cumsum_"}


class Seen(TorchDispatchMode):
    """Names of the operations that were called, and those that are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in REFUSED or (name in OF_FLOATS and args[0].is_floating_point()):
            self.refused.add(name)
        return func(*args, **(kwargs or {}))
