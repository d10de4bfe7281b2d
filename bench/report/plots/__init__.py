"""The plots: of one run (``run``), and of a study (``study``, ``cost``, ``weights``)."""
