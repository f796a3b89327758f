"""Plot results: each ``plot_*`` takes a result and returns a matplotlib figure.

No module here computes or saves results. Colours are Okabe and Ito's, which colour-blind readers
can distinguish, and a scheme has one colour and marker in every figure. The decorator ``styled``
leaves the user's own matplotlib settings unchanged.
"""
