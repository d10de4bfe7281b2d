"""Couplers, one file each. To add one, copy ``mean.py``: discovery imports every file of this folder."""
