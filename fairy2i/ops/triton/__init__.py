"""Triton back-ends. Nothing here is imported, and neither is Triton, before a kernel is used."""
