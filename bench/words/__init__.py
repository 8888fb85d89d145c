"""A plug-in for benches: a back end of the model server that writes words and needs no model."""
