"""Perceptual distance."""
