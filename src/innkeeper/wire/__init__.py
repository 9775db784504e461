"""Framed, multiplexed byte streams (docs/guest-protocol.md section 2): the one transport under the bus and the guest link."""
