"""The leak check: a coupler's perplexity counts only if the coupler passes; and a portrait of the coupler.

Read in this order: ``subject`` (what a check works on and returns), ``isolation``, ``causality``,
``behaviour`` and ``communication`` (the checks), ``leak_check`` (all checks of one configuration), ``audit``
(the trained model), ``mixing`` and ``portrait`` (what the coupler computes and costs), ``show``.
"""
