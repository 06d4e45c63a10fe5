"""Serving: image bytes to captions, and the Ray Serve application around it."""
