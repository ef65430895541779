"""Advised recipes against the best that an exhaustive search of the same grid finds."""
