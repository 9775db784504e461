"""The performance tables: `python -m bench`. Measured against a real server of its own, beside its peers, in one run."""
