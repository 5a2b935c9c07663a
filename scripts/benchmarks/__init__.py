"""What ``dit-rope bench`` measures, how it is timed and checked, and the report: one file for each section."""
