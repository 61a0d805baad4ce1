"""The world: what a policy sees, what it may do, and what happens then."""
