"""The command natcompat and its subcommands."""
