"""Step-3.7: fused experts as the interface has them, but for its decorator."""

from mc_cli.families import Adopted, FamilyFacts

FAMILY = FamilyFacts("step3p7", adopts=(Adopted("Step3p7Experts"),))
