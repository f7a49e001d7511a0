"""Operators that choose which visual tokens are kept."""
