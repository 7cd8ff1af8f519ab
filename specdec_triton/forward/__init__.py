"""A Hugging Face model, run over the nodes of a draft tree."""
