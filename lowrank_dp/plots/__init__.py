"""Results to figures: computes nothing, saves nothing.

One style: Okabe-Ito colours, which colour-blind readers can tell apart, and one colour and marker
for a scheme in every figure. Each ``plot_*`` takes a result and returns a matplotlib figure; it
is decorated with ``styled``, so that the user's own matplotlib settings stay as they are.
"""
