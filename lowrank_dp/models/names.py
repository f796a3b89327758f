"""Names that options choose from, importable without torch."""

METHODS = ("full", "lora", "lora-frozen-a")  # choices of the parameters that are trained
