"""``python -m bench.speed``: couplers, whole steps and the harness, timed beside their floors.

Read in this order: ``record`` (one measurement and the folder that keeps it), ``floors`` (the bounds),
``machine`` (the rates of a device, and steps timed alternating on it), ``forms`` (couplers alone), ``steps``
(whole steps, the harness), ``suites`` (what is measured), ``show`` and ``figures`` (the results).
"""
