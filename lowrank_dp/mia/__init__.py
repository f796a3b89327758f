"""Membership inference: signals -> scores -> metrics -> report.

`scores` turns losses, confidences and logits into one number a record, higher for a member.
`metrics` turns such numbers and the truth into AUC, TPR at a FPR and lower bounds on epsilon.
Both see arrays only, on numpy and scipy; nothing is imported before it is asked for.
"""
