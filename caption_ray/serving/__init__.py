"""The endpoint: an HTTP API from image bytes to captions, as an application on Ray Serve."""
