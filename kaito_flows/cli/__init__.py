"""The command `kaito-flows`. Each command imports what it needs: `--help` and `validate` answer at once."""

from kaito_flows.cli.app import main

__all__ = ["main"]
