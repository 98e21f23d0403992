"""Hidden states from layer to layer: the walk, its resume, and watching routers on the way."""
