"""Sizes that boot loader and kernel agree on. Source: Linux 6.1.192 asm/setup.h."""

BOOT_PARAMS_SIZE = 4096
"""The zero page."""

COMMAND_LINE_SIZE = 2048
"""Longest command line with its NUL."""
