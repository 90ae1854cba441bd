"""From spectra to a plan: how wide every site stays, why, and what the model will then cost."""

from rmtkd.planning.budget import POLICIES, Curve
from rmtkd.planning.choice import make_plan, retarget, settle, spectra_of
from rmtkd.planning.costs import COSTS, LATENCY, Cost, CostTable, Target, check_described, predict_cost
from rmtkd.planning.desk import MAX_LOSS, ON_CALIBRATION
from rmtkd.planning.latency import LatencyTable
from rmtkd.planning.pins import fixed_widths, parse_keep, uniform_sites
from rmtkd.planning.plan import FORMAT, Plan, SitePlan
from rmtkd.spectra import Spectrum

__all__ = [
    "COSTS",
    "FORMAT",
    "LATENCY",
    "MAX_LOSS",
    "ON_CALIBRATION",
    "POLICIES",
    "Cost",
    "CostTable",
    "Curve",
    "LatencyTable",
    "Plan",
    "SitePlan",
    "Spectrum",
    "Target",
    "check_described",
    "fixed_widths",
    "make_plan",
    "parse_keep",
    "predict_cost",
    "retarget",
    "settle",
    "spectra_of",
    "uniform_sites",
]
