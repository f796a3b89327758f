"""Names that options choose from, importable without torch."""

METHODS = ("full", "lora", "lora-frozen-a")  # choices of the parameters that are trained
PADDINGS = ("longest", "max-length")  # lengths that rows are padded to for a model
