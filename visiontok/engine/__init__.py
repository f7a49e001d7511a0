"""Joins a recipe and an adapter on a stock Hugging Face model, with public hooks only."""
