"""Answers of a model, corrected token by token: records of them, their files, and rows to train on.

Importing this needs torch only; transformers is what the models and tokenizers given are of.
"""

from .checked import new_record
from .files import RecordFile, read_records, write_records
from .lawftrack import read_lawftrack, write_lawftrack
from .marked import from_marked, read_marked, to_marked
from .records import Alternative, Anchor, Completion, Record, Source
from .session import AnchorSession
from .spans import spell, tokenizer_digest
from .training_rows import rows
from .views import Candidate, LaterEdit, Replacement, Token
from .walks import anchors_from_answer, retain_rows

__all__ = [
    "Alternative",
    "Anchor",
    "AnchorSession",
    "Candidate",
    "Completion",
    "LaterEdit",
    "Record",
    "RecordFile",
    "Replacement",
    "Source",
    "Token",
    "anchors_from_answer",
    "from_marked",
    "new_record",
    "read_lawftrack",
    "read_marked",
    "read_records",
    "retain_rows",
    "rows",
    "spell",
    "to_marked",
    "tokenizer_digest",
    "write_lawftrack",
    "write_records",
]
