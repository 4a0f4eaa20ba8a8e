"""Other people's checkpoints: each dialect is one file that reads one into a network and a ModelSpec."""
