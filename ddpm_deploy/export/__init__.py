"""From a trained network to the files that run elsewhere."""
