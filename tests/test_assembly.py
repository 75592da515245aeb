# SPDX-License-Identifier: Apache-2.0
"""From a configuration to models: what is refused before anything starts."""

import pytest

from kdengine.assembly import refuse_bf16_statistics
from kdengine.models import build_student


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp_bf16"])
@pytest.mark.parametrize("name", ["RN-Femto-64", "ViT-Pico-32"])
def test_pure_bf16_is_refused_for_batch_norms_alone(name: str, precision: str) -> None:
    student = build_student(name).tower
    if (name, precision) == ("RN-Femto-64", "bf16"):
        with pytest.raises(ValueError, match="use --train.precision amp_bf16"):
            refuse_bf16_statistics(precision, name, student)
    else:
        refuse_bf16_statistics(precision, name, student)
