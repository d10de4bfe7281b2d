"""Hypergraph layers, one file each: messages from experts to hyperedges and back.

To add a layer, copy ``hnhn.py`` and enter the class in ``CONV_TYPES`` of ``gnnmoe/couplers/hgnn.py``.
"""
