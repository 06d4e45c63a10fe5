"""Evaluation: captions for many pictures, and pictures of what was learnt."""
