"""What the tests share: small real models, stores and runs, and ways to damage or kill them."""
