"""The same policies in front of real vLLM engines."""
