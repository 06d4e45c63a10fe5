"""From pictures and captions, wherever they are, to batches."""
