"""`deflector cluster`: prefill and decode engines on this machine, started, watched and taken down."""
