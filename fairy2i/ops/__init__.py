"""Ops with kernels: ``training`` quantizes master weights, ``inference`` multiplies with packed ones.

Each file has the schemas, fakes and choice of a backend of its ops; ``cpu`` and ``triton`` have the kernels.
"""
