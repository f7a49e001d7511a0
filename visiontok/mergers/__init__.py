"""Operators that fold the dropped tokens into the kept ones."""
