"""What runs inside vLLM: a scheduler that cuts the prefill of deflected requests as their router asks."""
