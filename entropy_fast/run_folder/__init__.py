"""Run folders: everything a probe needs to be repeated offline, and what it left behind."""
