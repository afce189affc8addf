"""Arguments and help of every command; the commands import what they need when they run."""
