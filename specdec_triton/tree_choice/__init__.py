"""Chooses draft trees: the costs of rounds, the best topology, and the controller behind `tree="auto"`."""
