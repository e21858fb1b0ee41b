# SPDX-License-Identifier: Apache-2.0
"""A studio that needs no download: images of generated people with all that is true about them."""

from tritool.data.synthetic.body import ordinary_limb_lengths
from tritool.data.synthetic.picture import contact_sheet
from tritool.data.synthetic.poses import ACTIONS
from tritool.data.synthetic.settings import StudioSettings
from tritool.data.synthetic.studio import Studio

__all__ = ["ACTIONS", "Studio", "StudioSettings", "contact_sheet", "ordinary_limb_lengths"]
