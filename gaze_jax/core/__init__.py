"""The mechanism as pure functions on arrays: no model, no I/O."""
