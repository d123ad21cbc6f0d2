"""Layers shared by the five blocks.

Shape letters of the whole repository, in docstrings and in einsums:

    B batch             T query tokens      S key and value tokens   L stacked layers
    D width             F MLP hidden        N heads (or items)       K head dimension
    V vocabulary        P patches           H W C image rows, columns, channels (images only)
"""
