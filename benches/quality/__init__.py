"""How good the images are that each solver draws, and what they cost: python -m benches.quality."""
