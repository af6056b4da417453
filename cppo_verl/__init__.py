"""CPPO, Cumulative Prefix-divergence Policy Optimization (arXiv 2606.10968), as a plug-in for verl.

``cppo_verl.core`` is the maths in plain torch; ``cppo_verl.register`` is what verl loads through its entry point.
Importing the package itself imports nothing, so that the command line answers at once.
"""

__version__ = "0.1.0"
