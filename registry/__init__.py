"""MLflow: runs, model versions and aliases; the gate, the promotion and the rollback."""
