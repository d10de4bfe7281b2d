"""Corpora, vocabularies, blocks and loaders for word-level language modelling.

Flow: ``corpus`` (text → token streams) → ``blocks`` (streams → fixed-length samples) → ``loader``
(samples → batches). Nothing is imported here, so ``import bench.data`` costs nothing.
"""
