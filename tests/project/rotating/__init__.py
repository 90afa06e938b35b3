"""A backend whose password is a token that somebody else rotates, as IAM and Vault do."""
