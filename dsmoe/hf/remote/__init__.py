"""Files that an export contains beside the stand-alone files of its router and its experts' activation, for which
dsmoe's own stand here."""

import sys

from dsmoe.moe import activations
from dsmoe.routers import routing_dsmoe

sys.modules[f"{__name__}.routing_dsmoe"] = routing_dsmoe
sys.modules[f"{__name__}.activations_dsmoe"] = activations
