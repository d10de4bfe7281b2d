"""What ``bench.speed`` measures: couplers, whole steps and the harness beside their floors and targets.

Read in this order: ``rows`` (one measurement), ``machine`` (what the device can do), ``turns`` (things timed
in turn), ``forms``, ``coupler_rows``, ``step_rows`` and ``harness_rows`` (what is timed), ``cpu_suite`` and
``gpu_suite`` (the jobs of a suite), ``jobs`` (how they are run), ``record``; then, without torch,
``targets``, ``table``, ``figure``, ``step_figure`` and ``page``, which ``show`` puts together.
"""
