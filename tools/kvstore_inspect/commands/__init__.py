"""The commands, one module each. Each has one function `command`, made for click."""
