"""Names of the kinds of LoRA's implicit noise, importable without torch."""

NOISE_KINDS = ("gaussian", "fresh-a")  # kinds of :func:`lowrank_dp.lora.implicit_noise`
