"""Training what the solvers leave: a block's weights, scales and zeros, then the scales of the whole model."""
