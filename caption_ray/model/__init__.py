"""From pixels to captions: encoder, decoders, losses and search. Plain PyTorch: no Ray, no storage.

`encoder` turns pictures into regions, the decoders (interface: `decoder`) turn regions into words,
`captioner` joins the two, `loss` holds the training losses and `search` finds captions.
"""
