"""What runs: optimize, promote, rollback, demo. Each flow's signature is its form in the Prefect UI."""
