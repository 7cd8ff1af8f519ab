"""Applies logits processors of transformers to draft trees, on the device or on the host."""
