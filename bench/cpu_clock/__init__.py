"""A plug-in with which trainers measure processor time, so that other work on the machine does not count."""
