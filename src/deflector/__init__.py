"""Deflector: learn and deploy prefill deflection for disaggregated LLM serving."""

__version__ = "0.1.0"
