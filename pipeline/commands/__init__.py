"""The commands around the job; each module does what one of them says."""
