"""Tests that sampling keeps the target's distribution, for every rule, tree and filter, and that mutants do not."""
