"""`deflector serve`: an OpenAI-compatible router in front of vLLM's prefill and decode engines."""
