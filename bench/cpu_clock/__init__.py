"""A plug-in under which trainers measure processor seconds: what a run costs, whatever else the machine does."""
