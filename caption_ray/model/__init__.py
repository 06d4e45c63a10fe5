"""From pixels to captions: encoder, decoders, search and losses. Plain torch: no Ray, no storage.

The road through it: `encoder` turns pictures into regions, `attention` and `decoder` regions into
words, `captioner` joins the two, `loss` trains them and `search` finds captions.
"""
