"""The compiled event kernel: a cluster of vLLM engines, played iteration by iteration (see docs/simulator.md)."""
