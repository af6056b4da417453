"""The lines that the plug-in's trainers print for people, so that launchers find them in a log."""

LINE = "cppo_verl  "
"""How such a line begins."""
RUN_ENDS = "; the run ends; "
"""What stands in the line that says why a run ends itself, between the reason and how to continue."""
