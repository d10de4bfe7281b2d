"""Hypergraph layers, one file each: messages from experts to hyperedges and back.

To add a layer, copy ``mean.py``.
"""
