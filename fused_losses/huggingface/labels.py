from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    return (
        value.as_subclass(Tensor)
        if isinstance(value, Tensor) and type(value) is not Tensor and type(value).__name__ == "AnchorLabels"
        else value
    )
