"""The receiver of MLflow's webhooks: an alias set in MLflow's UI is looked at within seconds.

It believes what MLflow signed, once, and takes even that for a hint to look (`registry.reconcile`): a forged, repeated,
late or lost event promotes nothing. `python -m flows.hooks` or `modelpress hooks serve` runs it, `modelpress hooks
register URL` tells MLflow of it.
"""
