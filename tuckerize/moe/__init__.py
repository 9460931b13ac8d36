"""Model families: where routed experts lie in a checkpoint, and how tokens reach them."""
