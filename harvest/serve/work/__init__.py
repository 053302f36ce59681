"""The worker: takes jobs from the service and runs their commands on this machine."""
