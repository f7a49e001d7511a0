"""Where the stages lie in each model family."""
