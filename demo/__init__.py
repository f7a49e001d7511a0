"""The embedded model and the demo."""
