"""Built-in step-time profiles, one JSON file each."""
