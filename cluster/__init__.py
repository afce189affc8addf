"""The machines: storage, the services a laptop lacks, Ray sessions and job submission."""
