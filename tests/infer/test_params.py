import math

import pytest

from dsv3.errors import ConfigError
from dsv3.infer.params import SamplingParams


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0; it must be greater than 0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 1.5}, "min_p = 1.5; it must be from 0 to 1"),
        ({"min_p": math.nan}, "min_p = nan"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf; use 0 for none"),
        ({"frequency_penalty": math.nan}, "frequency_penalty = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0; use 1 for none"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty = 5e-324"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"logit_bias": ((-1, 1.0),)}, "token ids from 0 on"),
        ({"logit_bias": ((1, math.nan),)}, "finite numbers"),
        ({"logit_bias": ((1, math.inf),)}, "finite numbers"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "seed = 9223372036854775808"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"stop": ("a", "")}, "empty stop string"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**wrong)
