"""Past one process: a run in shards, which any number of machines make, in any order."""
