"""The commands with something to say: one module each, beside what they share.

A module has ``HELP``, one line; ``arguments(parser)``, which adds its arguments; and
``run(args)``, which gives the exit status or raises a `HijackError`. Its name is the
command's, and `hijack.cli.COMMANDS` lists it.
"""
