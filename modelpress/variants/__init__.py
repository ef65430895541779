"""Variants of a recipe: which there are, what they share, and which of those that were tried is wanted.

`expand` makes recipes of a grid, `schedule` puts what several share before them, `choose` finds the fronts and the
best.
"""
