"""One speculative `generate` call: its rounds, its CUDA graphs, its output."""
