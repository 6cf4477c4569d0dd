"""The commands: parse flags, make one call, report what the user can fix in one sentence."""
