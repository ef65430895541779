"""What runs: optimize, promote, rollback, collect, demo. Each flow's signature is its form in the Prefect UI."""
