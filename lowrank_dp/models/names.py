"""Names that options choose from, importable without torch."""

METHODS = ("full", "lora", "lora-frozen-a")  # what of a model is trained
