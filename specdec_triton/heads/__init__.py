"""Trained draft heads: EAGLE-1, EAGLE-2 and EAGLE-3, and Medusa. Reads their checkpoints and runs their layers."""
