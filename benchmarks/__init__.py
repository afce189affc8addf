"""What the fast code costs against a plain transcription of the same mathematics."""
