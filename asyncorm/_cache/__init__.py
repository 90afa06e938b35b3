"""The parts of the statement cache."""
