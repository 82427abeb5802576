"""Training a GPT of one's own: from a text to a model that the catalogue can add."""
