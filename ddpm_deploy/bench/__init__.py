"""How fast each backend runs a model on this machine: each in a process of its own, in turn."""
