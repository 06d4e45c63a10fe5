"""caption_ray: an attention captioner trained with Ray Data and Ray Train, served by Ray Serve."""

__version__ = "0.1.0"
