"""Ready ways through the package on real models: load, adapt, measure, absorb.

``domains`` finds text, ``models`` loads a model from disk, ``training`` and ``evaluation`` work on any causal language
model of transformers; ``adaptation`` puts them together for ``gain-ops adapt``. Nothing here reaches the network.
"""
