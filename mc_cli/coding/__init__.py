"""The way from a layer to its codes: expert inputs, Hessians, importance, corrections, the layer quantizer."""
