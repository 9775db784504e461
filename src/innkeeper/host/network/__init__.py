"""The guests' network: slots, addressing, firewall, resolver."""
