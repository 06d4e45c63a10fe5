"""Fixtures of the endpoint's tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from serving_fixtures import (  # noqa: F401
    backend,
    captions,
    client,
    load_on,
    picture,
    predictor,
    refused,
    save_run,
)
