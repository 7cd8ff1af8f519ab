"""Is what comes out distributed as the target's own samples? Every rule, tree and filter, and copies made wrong."""
