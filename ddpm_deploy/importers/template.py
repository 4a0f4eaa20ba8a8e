"""A spec file to start from, as `ddpm-export --spec-template` prints it."""

from typing import Final

TEMPLATE: Final = """\
image_shape = [3, 32, 32]     # channels, height, width
timesteps = 1000              # T, as it was trained
schedule = "linear"           # of β: linear, cosine, sigmoid, scaled_linear
prediction = "epsilon"        # what the network gives: epsilon, v, x0, mean
variance = "fixed_large"      # of the reverse steps: fixed_large, fixed_small, learned_range
value_range = [-1.0, 1.0]     # of the images that it was trained on
clip = true                   # of x̂0 to value_range in each step: as your own sampling loop does, or false
num_classes = 0               # labels that forward(x, t, y) takes
embedding = { kind = "timestep", scale = 1.0, offset = 0.0 }  # the network is given scale * t + offset
"""
