"""Reading a checkpoint: files, skeleton, inventory, one layer resident, the experts interface."""
