"""Data: records, how they become tokens and labels, and how those become batches."""

from clue_fast.data.collator import Collator, batches_by_length, padding_token
from clue_fast.data.encoding import EncodedRecords, check_encoding, encode, encode_for, encode_prompts, prompt_tokens
from clue_fast.data.labels import IGNORED_LABEL, answer_mask, has_head, head_of, shift_labels
from clue_fast.data.records import (
    COLUMN_SETS,
    OPTIONAL_COLUMNS,
    Example,
    Record,
    Source,
    check_disjoint,
    data_hash,
    load_records,
    load_retain_sets,
    load_sets,
    plain,
    read_rows,
)

__all__ = [
    "COLUMN_SETS",
    "IGNORED_LABEL",
    "OPTIONAL_COLUMNS",
    "Collator",
    "EncodedRecords",
    "Example",
    "Record",
    "Source",
    "answer_mask",
    "batches_by_length",
    "check_disjoint",
    "check_encoding",
    "data_hash",
    "encode",
    "encode_for",
    "encode_prompts",
    "has_head",
    "head_of",
    "load_records",
    "load_retain_sets",
    "load_sets",
    "padding_token",
    "plain",
    "prompt_tokens",
    "read_rows",
    "shift_labels",
]
