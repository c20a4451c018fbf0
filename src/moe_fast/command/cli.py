"""`moe-fast`: all its commands. Each file registers its own when it is loaded."""

from moe_fast.command import build_commands, inspection_commands, operation_commands
from moe_fast.command.application import app, command_for

__all__ = ["app", "build_commands", "command_for", "inspection_commands", "operation_commands"]
