"""The look-ups' PTX, run on every byte in every place, against the table itself."""

import numpy as np
import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from kernels.lookup import NF4_CODE, assembly, half_bits
from tests.kernels import ptx


def test_the_values_are_bitsandbytes():
    assert torch.equal(get_4bit_type("nf4", device="cpu"), torch.tensor(NF4_CODE))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_bits_are_torchs(half):
    theirs = torch.tensor(NF4_CODE).to(getattr(torch, half)).view(torch.int16)
    assert [half_bits(value, half) & 0xFFFF for value in NF4_CODE] == [int(bits) & 0xFFFF for bits in theirs]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("lookup", ["shuffle", "permute", "mixed"])
def test_every_byte_in_every_place(lookup, half):
    bits = np.array([half_bits(value, half) for value in NF4_CODE], np.uint32)
    everything = np.arange(256, dtype=np.uint32).reshape(8, 32)
    for place in range(4):
        for lanes in everything:
            other = np.random.default_rng(place).integers(0, 256, (4, 32), dtype=np.uint32)
            other[place] = lanes
            word = other[0] | other[1] << 8 | other[2] << 16 | other[3] << 24
            found = ptx.run(assembly(lookup, half), {"$4": word})
            for names, nibbles in ((("$0", "$1"), other >> 4), (("$2", "$3"), other & 15)):
                want = bits[nibbles]
                np.testing.assert_array_equal(found[names[0]], want[0] | want[1] << 16)
                np.testing.assert_array_equal(found[names[1]], want[2] | want[3] << 16)
