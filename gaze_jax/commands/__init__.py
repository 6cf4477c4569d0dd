"""The commands: flags in, one call, and one sentence for what the user can mend."""
