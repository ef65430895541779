"""The parts of a report's page: each a function from a story to a section, or to None where there is nothing to say."""
