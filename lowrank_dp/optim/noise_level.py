"""Name under which an optimizer's parameter groups hold the noise level of their gradients."""

NOISE_LEVEL = "mean_noise_std"  # absolute, in the units of ``p.grad``; read at every step
