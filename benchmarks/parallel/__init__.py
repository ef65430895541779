"""Work spread over processes, measured."""
