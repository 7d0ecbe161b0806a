"""What a fine-tuned model has learnt and what it has forgotten: `check`, the function behind `fused-losses check`.

Importing this needs torch only.
"""

from .general import PROMPTS, general_texts
from .inputs import Probe, Prompt, read_probes, read_prompts, read_text
from .report import Report
from .run import check

__all__ = ["PROMPTS", "Probe", "Prompt", "Report", "check", "general_texts", "read_probes", "read_prompts", "read_text"]
