"""A bookshop: the broad schema that most tests use."""
