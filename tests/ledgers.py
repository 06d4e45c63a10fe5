"""Ledgers as masks over all pictures, which tests compare and count."""

import numpy as np

from caption_ray.data.ledger import Ledger


def ledger_of(sizes, mask):
    """The ledger that has seen the pictures of a bool mask, (pictures,)."""
    ledger = Ledger(sizes)
    ledger.mark(np.flatnonzero(mask))
    return ledger


def mask_of(ledger):
    """Which pictures the ledger, or the bytes of its file, has seen: bool (pictures,)."""
    if isinstance(ledger, bytes):
        ledger = Ledger.from_bytes(ledger)
    return ledger.flags(np.arange(len(ledger.sizes))).astype(bool)
