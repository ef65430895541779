"""`python -m serving`."""

from serving.main import main

main()
