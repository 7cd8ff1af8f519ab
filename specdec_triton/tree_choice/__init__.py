"""Which draft tree pays: what rounds cost, the best topology, and the controller behind `tree="auto"`."""
