"""The command line: options from the schemas, help, the reference pages, starting in several processes."""
