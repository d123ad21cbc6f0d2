"""Vertical foundation models from scratch: five blocks, any modalities, any modality as the centre."""
