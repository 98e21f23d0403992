"""What turns a layer into codes: expert inputs, Hessians, importance, corrections, the layer quantizer."""
