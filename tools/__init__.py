"""The `cbit` command line."""
