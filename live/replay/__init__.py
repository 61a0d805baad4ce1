"""Load generation: requests sent to a live cluster on schedule, and what their clients see."""
