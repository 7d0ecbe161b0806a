"""Rows with anchors, and the batch that a collator makes of them."""

from fused_losses.huggingface.collator import AnchorCollator

PAD = 99
ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, -100, 7], "confidence": [0, 0, 0.5]},
    {"input_ids": [8, 9, 10, 11], "anchors": [[2, 0.25]]},
]


def collate(*rows, **options):
    return AnchorCollator(PAD, **options)(list(rows))


def plain(batch):
    return {name: values.tolist() for name, values in batch.items()}
