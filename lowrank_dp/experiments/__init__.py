"""One module a claim of the papers: a frozen config goes in, a frozen result comes out.

Each has ``run(config) -> result``; nothing here draws or saves.
"""
