"""The commands of `medisyn`, one module each; `register(app)` adds it to the command line."""
