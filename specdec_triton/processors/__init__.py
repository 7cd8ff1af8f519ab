"""Logits processors of transformers on draft trees: on the device, and on the host."""
