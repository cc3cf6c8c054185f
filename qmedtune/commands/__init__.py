"""The command line's commands: parse, call one function, print."""
