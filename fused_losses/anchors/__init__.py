"""Answers of a model, corrected token by token: records of them, their files, and rows to train on.

Importing this needs torch only; transformers is what the tokenizers given are of.
"""

from .checked import new_record
from .files import RecordFile, read_records, write_records
from .lawftrack import read_lawftrack, write_lawftrack
from .marked import from_marked, read_marked, to_marked
from .records import Alternative, Anchor, Completion, Record, Source
from .spans import spell, tokenizer_digest
from .training_rows import rows

__all__ = [
    "Alternative",
    "Anchor",
    "Completion",
    "Record",
    "RecordFile",
    "Source",
    "from_marked",
    "new_record",
    "read_lawftrack",
    "read_marked",
    "read_records",
    "rows",
    "spell",
    "to_marked",
    "tokenizer_digest",
    "write_lawftrack",
    "write_records",
]
