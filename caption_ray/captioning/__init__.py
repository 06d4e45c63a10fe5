"""What training, evaluation and serving share: the checkpoint, the run's folder, the predictor that
captions with a checkpoint, metrics and trackers. Nothing here knows Ray."""
