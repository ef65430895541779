"""`python -m modelpress.cli`."""

from modelpress.cli import main

main()
