"""Make a cheaper model by a recipe, prove what that changed, and choose among the results."""
