"""Tasks, scoring and statistics: what a recipe costs in answers."""
