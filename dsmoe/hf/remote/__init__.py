"""Files that an export contains beside the stand-alone file of its router, for which dsmoe's own stands here."""

import sys

from dsmoe.routers import routing_dsmoe

sys.modules[f"{__name__}.routing_dsmoe"] = routing_dsmoe
