"""A corpus of short tales and explanations, written by a teacher: prompts, filters, shards."""
