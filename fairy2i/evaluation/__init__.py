"""Evaluation: perplexity under named protocols, and the tables that show it."""
