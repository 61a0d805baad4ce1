"""Measures engines: drives them over the loads that matter, and learns their step times and their links."""
