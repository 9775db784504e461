"""What this host can do, found out by doing it: one file per part of the host, each leaving nothing behind."""
