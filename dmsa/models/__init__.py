"""Encoder, ASPP, decoder, segmenter and teacher."""
