"""Corpora, vocabularies, blocks and loaders for language modelling by words or subwords.

Read in this order: ``sources`` (text), ``tokenizer`` (token streams), ``corpus``, ``blocks`` (fixed-length
samples), ``loader`` (batches), ``curriculum``; ``cache`` and ``reference_lines`` stand beside them.
"""
