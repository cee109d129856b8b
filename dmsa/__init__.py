"""DMSA: unsupervised semantic segmentation by dilated multi-scale attention."""
