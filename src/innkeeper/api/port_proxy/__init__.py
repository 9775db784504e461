"""HTTP to ports of guests. Both ends are hostile: what comes from either is parsed strictly and written anew, never passed on as it came."""
