"""Runs a Hugging Face model over the nodes of a draft tree."""
