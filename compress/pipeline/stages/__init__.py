"""One file for each family of stages of a recipe."""
