"""Key of the noise level in an optimizer's parameter groups."""

NOISE_LEVEL = "mean_noise_std"  # absolute, in the units of ``p.grad``; read at every step
