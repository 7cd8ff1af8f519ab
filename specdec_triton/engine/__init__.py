"""Runs one speculative `generate` call: its rounds, its CUDA graphs and its output."""
