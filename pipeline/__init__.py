"""The job: prepare, train, evaluate, and the commands around them."""
