"""Fast twins of the operators that cost real time."""
