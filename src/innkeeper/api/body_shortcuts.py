"""Bodies that go past the application, for whoever only passes them on: a task to wake for every piece would be most of the work."""

from __future__ import annotations

from collections.abc import Callable

# What the listener leaves in a request's scope. Both are only for pieces that nobody has to be waited for; the rest goes by `receive` and `send`.
#
# A function that writes a piece of an answer of announced length, after `http.response.start` and while no `send` waits; whether it did.
SEND_NOW = "innkeeper.send_now"
# A function that is given a function: it takes as many bytes of the request's body as it can, before they are collected for `receive`; returns how many.
OFFER_BODY = "innkeeper.offer_body"

SendNow = Callable[[memoryview], bool]
OfferBody = Callable[[Callable[[memoryview], int]], None]
