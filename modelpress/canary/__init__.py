"""A candidate takes over step by step, watched by tests that may be looked at all the time.

`log` is what everybody follows: the state of each canary, as entries of an alias's log. `tally` is what each server
saw. `decide` is what follows from both: pure arithmetic on counts, by which the controller decides, and each server for
itself.
"""
