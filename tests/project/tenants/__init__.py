"""A backend whose wrapper sets something for its tenant before each cursor."""
