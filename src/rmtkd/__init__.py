"""Make a trained PyTorch model several times smaller, faster, and dense, with the evidence of what that costs.

It implements RMT-KD (arXiv 2509.15724).
"""

from rmtkd.artifact import Inspection as Inspection
from rmtkd.artifact import inspect as inspect
from rmtkd.artifact import load as load
from rmtkd.artifact import save as save
from rmtkd.artifact import seal as seal
from rmtkd.compression import Compressed as Compressed
from rmtkd.compression import compress as compress
from rmtkd.compression import narrow as narrow
from rmtkd.compression import plan as plan
from rmtkd.compression import resume as resume
from rmtkd.conformance import Verdict as Verdict
from rmtkd.conformance import check as check
from rmtkd.distillation import Recovery as Recovery
from rmtkd.exports import export as export
from rmtkd.measurement import Footprint as Footprint
from rmtkd.measurement import measure as measure
from rmtkd.planning import Plan as Plan
from rmtkd.planning import retarget as retarget
from rmtkd.pretrained import register as _register
from rmtkd.schedule import Options as Options
from rmtkd.sites import Site as Site
from rmtkd.sites import find_sites as find_sites
from rmtkd.sizes import Sizes as Sizes
from rmtkd.sizes import compress_sizes as compress_sizes

_register()
