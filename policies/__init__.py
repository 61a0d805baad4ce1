"""Given a state of the cluster, decide where a request runs."""
