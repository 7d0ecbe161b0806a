"""Fine-tune on corrected answers and chats, as a library: what `fused-losses train` does.

Importing this needs torch only; transformers, peft and accelerate (extra `train`) are imported where they are used.
"""

from .data import Data, Row, read, read_text
from .run import train
from .settings import METHODS, Method

__all__ = ["METHODS", "Data", "Method", "Row", "read", "read_text", "train"]
