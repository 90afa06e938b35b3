"""The parts of transactions: how blocks begin and end, and what happens then."""
